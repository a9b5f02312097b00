"""From pictures to features in memory: decode threads, packs, the encoder."""

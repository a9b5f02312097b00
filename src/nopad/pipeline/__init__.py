"""From images to features in memory: decode threads, packs, the encoder."""

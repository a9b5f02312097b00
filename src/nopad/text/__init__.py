"""The text half of image-text checkpoints: towers, tokenizers, similarity."""

"""Layers that the families share: attention over packs, blocks, positions, pooling."""

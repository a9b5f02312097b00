"""Layers shared by the families: attention, blocks, positions, pooling."""

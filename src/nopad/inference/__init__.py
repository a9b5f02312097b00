"""Inference: packs of a fixed shape, compiled layers, fused layers, float8."""

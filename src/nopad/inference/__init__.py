"""Encoders made ready for inference: packs of one shape, compiled layers, fused kernels."""

"""Attention and other kernels: tensors and segments in, tensors out."""

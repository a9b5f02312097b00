"""Attention and other kernels over tensors and segments."""

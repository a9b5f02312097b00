"""Intermediate results of an encoder: tokens of single layers, and attention maps."""

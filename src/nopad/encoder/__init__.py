"""`PackedEncoder`, the contract that all families share."""

from nopad.encoder.packed import PackedEncoder

__all__ = ["PackedEncoder"]

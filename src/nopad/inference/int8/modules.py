"""Modules with int8 weights, for inference only."""

from __future__ import annotations

from nopad.inference.int8 import format
from nopad.inference.quantized import QuantizedLinear


class Int8Linear(QuantizedLinear):
    """A linear layer with an int8 weight and one scale per output."""

    precision = "int8"
    round_weight = staticmethod(format.round_weight)
    quantize_rows = staticmethod(format.quantize_rows)
    scaled_mm = staticmethod(format.scaled_mm)

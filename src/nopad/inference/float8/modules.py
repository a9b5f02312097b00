"""Modules with float8 weights, for inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nopad.inference.float8 import format
from nopad.inference.quantized import QuantizedLinear, output_dtype
from nopad.kernels.gemm_formats import FP8_ALIGNMENT
from nopad.layers.mlp import Activation


class Float8Linear(QuantizedLinear):
    """A linear layer with a float8 weight and one scale per output."""

    precision = "fp8"
    round_weight = staticmethod(format.round_weight)
    quantize_rows = staticmethod(format.quantize_rows)
    scaled_mm = staticmethod(format.scaled_mm)

    @classmethod
    def check_linear(cls, linear: Any) -> None:
        """See `QuantizedLinear`; sizes have to be multiples of `FP8_ALIGNMENT`."""
        super().check_linear(linear)
        if linear.in_features % FP8_ALIGNMENT or linear.out_features % FP8_ALIGNMENT:
            raise ValueError(
                f"precision 'fp8': expected sizes that are multiples of {FP8_ALIGNMENT}, "
                f"got a linear layer of {linear.in_features} to {linear.out_features}"
            )


class Float8QKV(nn.Module):
    """One layer for queries, keys and values: queries and keys in float8, values in the original dtype.

    Raises:
        ValueError: see `Float8Linear.check_linear`.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        Float8Linear.check_linear(qkv)
        hidden_size = qkv.out_features // 3
        self.query_key = Float8Linear(slice_rows(qkv, 0, 2 * hidden_size))
        self.value = slice_rows(qkv, 2 * hidden_size, 3 * hidden_size)

    def forward(self, input: Tensor) -> Tensor:
        """`(T, D)` to `(T, 3 · D)`."""
        return torch.cat((self.query_key(input), self.value(input)), dim=1)


class Float8GatedMLP(nn.Module):
    """`GatedMLP` with SiLU in float8; gate, product and rounding of the input of `down` are one pass.

    Args:
        gate_up: one layer for both, gate before up.
        activation: activation of the gate.
        down: the layer after them.

    Raises:
        ValueError: see `Float8Linear.check_linear`.
    """

    def __init__(self, gate_up: nn.Linear, activation: Activation, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up = Float8Linear(gate_up)
        self.activation = activation
        self.down = Float8Linear(down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        quantized, scale = format.silu_mul_quantize(self.gate_up(hidden_states))
        return self.down.multiply(quantized, scale, output_dtype(hidden_states))


def slice_rows(linear: nn.Linear, start: int, end: int) -> nn.Linear:
    """A linear layer with the outputs `start` to `end` of another; a copy, without gradients."""
    part = nn.Linear(linear.in_features, end - start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[start:end].clone(), requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[start:end].clone(), requires_grad=False)
    return part

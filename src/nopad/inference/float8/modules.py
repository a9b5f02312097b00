"""Modules with float8 weights, for inference only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nopad.inference.float8.format import quantize_rows, round_weight, scaled_mm, silu_mul_quantize
from nopad.kernels.gemm_formats import FP8, FP8_ALIGNMENT
from nopad.layers.linear import is_plain_linear
from nopad.layers.mlp import Activation

SAME_SIZE_INTEGER = {FP8: torch.uint8, torch.float32: torch.int32}


class Float8Linear(nn.Module):
    """A linear layer with a float8 weight and one scale per output.

    Raises:
        ValueError: see `check_linear`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        check_linear(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = round_weight(linear.weight.detach())
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        """`(T, in)` to `(T, out)`."""
        return self.multiply(*quantize_rows(input), output_dtype(input))

    def multiply(self, quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`(T, in)` float8 with scales `(T, 1)` to `(T, out)` in `dtype`."""
        output = scaled_mm(quantized, scale, self.weight, self.scale, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        # Weight and scale are moved as integers, so that `.to(dtype)` casts the bias only.
        def move(tensor: Tensor) -> Tensor:
            if tensor is self.bias:
                return fn(tensor)
            return fn(tensor.view(SAME_SIZE_INTEGER[tensor.dtype])).view(tensor.dtype)

        return super()._apply(move, recurse)


class Float8QKV(nn.Module):
    """One layer for queries, keys and values: queries and keys in float8, values in the original dtype.

    Raises:
        ValueError: see `check_linear`.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        check_linear(qkv)
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
        ValueError: see `check_linear`.
    """

    def __init__(self, gate_up: nn.Linear, activation: Activation, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up = Float8Linear(gate_up)
        self.activation = activation
        self.down = Float8Linear(down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        quantized, scale = silu_mul_quantize(self.gate_up(hidden_states))
        return self.down.multiply(quantized, scale, output_dtype(hidden_states))


def output_dtype(input: Tensor) -> torch.dtype:
    """The dtype that `nn.Linear` returns for `input`: autocast's where it is enabled."""
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else input.dtype


def slice_rows(linear: nn.Linear, start: int, end: int) -> nn.Linear:
    """A linear layer with the outputs `start` to `end` of another; a copy, without gradients."""
    part = nn.Linear(linear.in_features, end - start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[start:end].clone(), requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[start:end].clone(), requires_grad=False)
    return part


def check_linear(linear: Any) -> None:
    """Check that a linear layer can become a `Float8Linear`.

    Raises:
        ValueError: sizes that are no multiples of `FP8_ALIGNMENT`; see also `check_plain_linear`.
    """
    check_plain_linear(linear)
    if linear.in_features % FP8_ALIGNMENT or linear.out_features % FP8_ALIGNMENT:
        raise ValueError(
            f"precision 'fp8': expected sizes that are multiples of {FP8_ALIGNMENT}, "
            f"got a linear layer of {linear.in_features} to {linear.out_features}"
        )


def check_plain_linear(linear: Any) -> None:
    """Check that a module is a plain linear layer.

    Raises:
        ValueError: an adapter, a quantised layer, or another module.
    """
    if not is_plain_linear(linear):
        raise ValueError(
            f"precision 'fp8': expected linear layers with a floating-point weight, got {type(linear).__name__}; "
            f"merge it into its weight, or load the checkpoint with precision='fp8' first"
        )

"""Triton kernels, each beside the plain torch that it stands for; importable only where Triton is."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nopad.inference.float8 import FLOAT8, LARGEST, SMALLEST_AMAX


@torch.library.custom_op("nopad::silu_mul_quantize", mutates_args=())
def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """See `nopad.inference.float8.silu_mul_quantize`, which is the plain form for the CPU."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, width, dtype=FLOAT8)
    scale = gate_up.new_empty(rows, 1, dtype=torch.float32)
    if rows:
        block = triton.next_power_of_2(width)
        warps = min(max(block // 512, 1), 16)
        _silu_mul_quantize[(rows,)](  # pyright: ignore[reportIndexIssue]
            gate_up, output, scale, gate_up.stride(0), width, LARGEST, SMALLEST_AMAX, block, num_warps=warps
        )
    return output, scale


@silu_mul_quantize.register_fake
def _(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty(rows, width, dtype=FLOAT8), gate_up.new_empty(rows, 1, dtype=torch.float32)


@triton.jit
def _silu_mul_quantize(gate_up, output, scale, stride, width, largest, smallest_amax, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    factor = tl.maximum(tl.max(tl.abs(value), 0), smallest_amax) / largest
    tl.store(output + row * width + columns, (value / factor).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, factor)

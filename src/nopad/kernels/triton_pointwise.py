"""Pointwise operations between GEMMs as Triton kernels; importable only where Triton is installed.

Their references in plain torch are in `nopad.inference.float8.format` and `nopad.inference.fusion.gemm_reference`.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from nopad.kernels.gemm_formats import FP8, FP8_MAX


def silu_mul_quantize(gate_up: Tensor, min_amax: float) -> tuple[Tensor, Tensor]:
    """See `nopad.inference.float8.format.silu_mul_quantize`; `min_amax` is the lower bound of a row's largest value."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(num_rows, size, dtype=FP8)
    scale = gate_up.new_empty(num_rows, 1, dtype=torch.float32)
    if num_rows:
        block = triton.next_power_of_2(size)
        warps = min(max(block // 512, 1), 16)
        _silu_mul_quantize[(num_rows,)](  # pyright: ignore[reportIndexIssue]
            gate_up, output, scale, gate_up.stride(0), size, FP8_MAX, min_amax, block, num_warps=warps
        )
    return output, scale


silu_mul_quantize_op = torch.library.custom_op("nopad::silu_mul_quantize", silu_mul_quantize, mutates_args=())
"""The same in compiled graphs."""


@silu_mul_quantize_op.register_fake
def _(gate_up: Tensor, min_amax: float) -> tuple[Tensor, Tensor]:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty(num_rows, size, dtype=FP8), gate_up.new_empty(num_rows, 1, dtype=torch.float32)


@triton.jit
def _silu_mul_quantize(gate_up, output, scale, stride, size, fp8_max, min_amax, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < size
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + column, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    row_scale = tl.maximum(tl.max(tl.abs(value), 0), min_amax) / fp8_max
    tl.store(output + row * size + column, (value / row_scale).to(tl.float8e4nv), mask=mask)
    tl.store(scale + row, row_scale)


def norm(tokens: Tensor, pending_bias: Tensor | None, eps: float, *, subtract_mean: bool) -> Tensor:
    """`F.rms_norm(tokens + pending_bias, …)`, or `F.layer_norm`, without a weight, computed in float32.

    Args:
        tokens: `(T, D)`.
        pending_bias: `(D,)` float32 or `None`.
        eps: eps of the norm.
        subtract_mean: subtract the mean of each row, as LayerNorm does.

    Returns:
        `(T, D)` in the dtype of `tokens`.
    """
    num_rows, hidden_size = tokens.shape
    output = torch.empty_like(tokens)
    block = triton.next_power_of_2(hidden_size)
    warps = min(max(block // 256, 1), 16)
    flags = pending_bias is not None, subtract_mean
    _norm[(num_rows,)](  # pyright: ignore[reportIndexIssue]
        tokens, pending_bias, output, hidden_size, eps, block, *flags, num_warps=warps
    )
    return output


@triton.jit
def _norm(
    tokens, bias, output, hidden_size, eps, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, SUBTRACT_MEAN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    value = tl.load(tokens + row * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=mask, other=0.0)
    if SUBTRACT_MEAN:
        value = tl.where(mask, value - tl.sum(value, 0) / hidden_size, 0.0)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / hidden_size + eps)
    tl.store(output + row * hidden_size + column, (value * rstd).to(output.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up`, computed in float32.

    Args:
        gate_up: `(T, 2 · I)`, interleaved columns of gate and up.

    Returns:
        `(T, I)`.
    """
    output = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    block = 2048
    _silu_mul[(triton.cdiv(output.numel(), block),)](  # pyright: ignore[reportIndexIssue]
        gate_up, output, output.numel(), block, num_warps=8
    )
    return output


@triton.jit
def _silu_mul(gate_up, output, numel, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    pairs = start * 2 + tl.arange(0, 2 * BLOCK)
    values = tl.load(gate_up + pairs, mask=pairs < 2 * numel, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(values, (BLOCK, 2)))
    offset = start + tl.arange(0, BLOCK)
    tl.store(output + offset, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=offset < numel)


def apply_rotary_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate queries and keys in place, see `nopad.layers.rope_3d.apply_rotary_interleaved`.

    Args:
        qkv: `(T, H, 3, K)`, contiguous.
        cos, sin: `(T, K)` float32.
    """
    num_rows, num_heads, _, head_dim = qkv.shape
    block = triton.next_power_of_2(head_dim // 2)
    _apply_rotary[(num_rows,)](  # pyright: ignore[reportIndexIssue]
        qkv, cos, sin, num_heads, head_dim, triton.next_power_of_2(2 * num_heads), block, num_warps=4
    )


@triton.jit
def _apply_rotary(qkv, cos, sin, num_heads, head_dim, PARTS: tl.constexpr, PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    part = tl.arange(0, PARTS)  # query and key of the first head, of the second, …
    channel = tl.arange(0, 2 * PAIRS)
    mask = (part < 2 * num_heads)[:, None] & (channel < head_dim)[None, :]
    offset = ((row * num_heads + part // 2) * 3 + part % 2)[:, None] * head_dim + channel[None, :]
    values = tl.load(qkv + offset, mask=mask, other=0.0).to(tl.float32)
    x0, x1 = tl.split(tl.reshape(values, (PARTS, PAIRS, 2)))
    even, odd = row * head_dim + 2 * pair, row * head_dim + 2 * pair + 1
    pair_mask = 2 * pair < head_dim
    cos0, cos1 = tl.load(cos + even, mask=pair_mask)[None, :], tl.load(cos + odd, mask=pair_mask)[None, :]
    sin0, sin1 = tl.load(sin + even, mask=pair_mask)[None, :], tl.load(sin + odd, mask=pair_mask)[None, :]
    rotated = tl.join(x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1)
    tl.store(qkv + offset, tl.reshape(rotated, (PARTS, 2 * PAIRS)).to(qkv.dtype.element_ty), mask=mask)


def start_residual(
    tokens: Tensor, eps: float, zero_mean: bool, fp8_row_rms: float | None, sum_sq: Tensor | None
) -> Tensor:
    """Prepare tokens for the first folded block: subtract means, round to float8, and sum the squares of each row.

    Args:
        tokens: `(T, D)`.
        eps: eps of the norm.
        zero_mean: subtract the mean of each row, in place.
        fp8_row_rms: root mean square that rows are scaled to before rounding to float8; `None` does not round.
        sum_sq: `(T,)` float32 output for the sum of squares of each row, or `None`.

    Returns:
        `(T, D)` input of the first GEMM: the tokens themselves, or their float8 rows.
    """
    num_rows, hidden_size = tokens.shape
    gemm_input = tokens if fp8_row_rms is None else torch.empty_like(tokens, dtype=FP8)
    block = triton.next_power_of_2(hidden_size)
    flags = zero_mean, fp8_row_rms is not None
    _start_residual[(num_rows,)](  # pyright: ignore[reportIndexIssue]
        tokens, gemm_input, sum_sq, hidden_size, eps, fp8_row_rms or 0.0, block, *flags, num_warps=4
    )
    return gemm_input


@triton.jit
def _start_residual(
    tokens,
    gemm_input,
    sum_sq,
    hidden_size,
    eps,
    fp8_row_rms,
    BLOCK: tl.constexpr,
    ZERO_MEAN: tl.constexpr,
    IS_FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    value = tl.load(tokens + row * hidden_size + column, mask=mask, other=0.0).to(tl.float32)
    if ZERO_MEAN:
        value = tl.where(mask, value - tl.sum(value, 0) / hidden_size, 0.0)
        tl.store(tokens + row * hidden_size + column, value.to(tokens.dtype.element_ty), mask=mask)
    total = tl.sum(value * value, 0)
    if sum_sq is not None:
        tl.store(sum_sq + row, total)
    if IS_FP8:
        factor = tl.rsqrt(total / hidden_size + eps) * fp8_row_rms
        tl.store(gemm_input + row * hidden_size + column, (value * factor).to(tl.float8e4nv), mask=mask)

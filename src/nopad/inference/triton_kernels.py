"""Triton kernels, importable only where Triton is; plain torch for each is in `float8`, `products` or `rows`."""

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


def rms_norm(tokens: Tensor, pending: Tensor | None, eps: float) -> Tensor:
    """`F.rms_norm(tokens + pending, …)` without a weight, in float32.

    Args:
        tokens: `(T, D)`.
        pending: `(D,)` float32 or `None`.

    Returns:
        `(T, D)` in the dtype of `tokens`.
    """
    rows, width = tokens.shape
    output = torch.empty_like(tokens)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 256, 1), 16)
    _rms_norm[(rows,)](  # pyright: ignore[reportIndexIssue]
        tokens, pending, output, width, eps, block, pending is not None, num_warps=warps
    )
    return output


@triton.jit
def _rms_norm(tokens, pending, output, width, eps, BLOCK: tl.constexpr, PENDING: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(tokens + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if PENDING:
        value += tl.load(pending + columns, mask=inside, other=0.0)
    rstd = tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(output + row * width + columns, (value * rstd).to(output.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) · up` in float32.

    Args:
        gate_up: `(T, 2 · I)`, columns of gate and up in turn.

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
def _silu_mul(gate_up, output, number, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    both = first * 2 + tl.arange(0, 2 * BLOCK)
    values = tl.load(gate_up + both, mask=both < 2 * number, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(values, (BLOCK, 2)))
    place = first + tl.arange(0, BLOCK)
    tl.store(output + place, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=place < number)


def turn_(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn queries and keys in place, see `nopad.layers.rope_3d.apply_rotary_interleaved`.

    Args:
        qkv: `(T, H, 3, K)`, contiguous.
        cos, sin: `(T, K)` float32.
    """
    rows, heads, _, size = qkv.shape
    block = triton.next_power_of_2(size // 2)
    _turn[(rows,)](  # pyright: ignore[reportIndexIssue]
        qkv, cos, sin, heads, size, triton.next_power_of_2(2 * heads), block, num_warps=4
    )


@triton.jit
def _turn(qkv, cos, sin, heads, size, PARTS: tl.constexpr, PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    part = tl.arange(0, PARTS)  # query and key of the first head, of the second, …
    channel = tl.arange(0, 2 * PAIRS)
    inside = (part < 2 * heads)[:, None] & (channel < size)[None, :]
    place = ((row * heads + part // 2) * 3 + part % 2)[:, None] * size + channel[None, :]
    values = tl.load(qkv + place, mask=inside, other=0.0).to(tl.float32)
    first, second = tl.split(tl.reshape(values, (PARTS, PAIRS, 2)))
    even, odd = row * size + 2 * pair, row * size + 2 * pair + 1
    whole = 2 * pair < size
    cos0, cos1 = tl.load(cos + even, mask=whole)[None, :], tl.load(cos + odd, mask=whole)[None, :]
    sin0, sin1 = tl.load(sin + even, mask=whole)[None, :], tl.load(sin + odd, mask=whole)[None, :]
    turned = tl.join(first * cos0 - second * sin0, second * cos1 + first * sin1)
    tl.store(qkv + place, tl.reshape(turned, (PARTS, 2 * PAIRS)).to(qkv.dtype.element_ty), mask=inside)


def begin(tokens: Tensor, eps: float, centred: bool, small: float | None, squares: Tensor | None) -> Tensor:
    """Tokens as the first block of a `Stream` takes them.

    Args:
        tokens: `(T, D)`.
        eps: of the norm.
        centred: take the mean of each row away, in place.
        small: root mean square that rows are scaled to and rounded to float8; `None` leaves them as they are.
        squares: `(T,)` float32, that the sum of the squares of each row is written to.

    Returns:
        `(T, D)` operand, which are the tokens themselves without `small`.
    """
    rows, width = tokens.shape
    operand = tokens if small is None else torch.empty_like(tokens, dtype=FLOAT8)
    block = triton.next_power_of_2(width)
    _begin[(rows,)](  # pyright: ignore[reportIndexIssue]
        tokens, operand, squares, width, eps, small or 0.0, block, centred, small is not None, num_warps=4
    )
    return operand


@triton.jit
def _begin(
    tokens, operand, squares, width, eps, small, BLOCK: tl.constexpr, CENTRED: tl.constexpr, SMALL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(tokens + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / width, 0.0)
        tl.store(tokens + row * width + columns, value.to(tokens.dtype.element_ty), mask=inside)
    total = tl.sum(value * value, 0)
    if squares is not None:
        tl.store(squares + row, total)
    if SMALL:
        factor = tl.rsqrt(total / width + eps) * small
        tl.store(operand + row * width + columns, (value * factor).to(tl.float8e4nv), mask=inside)


def fill_up(tokens: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """See `nopad.inference.padding.fill_up_rows`, which is the plain form; writes to `room`."""
    rows, width = tokens.shape
    finite = tokens.new_empty(rows, dtype=torch.bool)
    block = triton.next_power_of_2(width)
    _fill_up[(len(room),)](tokens, room, finite, rows, width, block, num_warps=4)  # pyright: ignore[reportIndexIssue]
    return room, finite


@triton.jit(do_not_specialize=["rows"])
def _fill_up(tokens, output, finite, rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(tokens + row * width + columns, mask=inside & (row < rows), other=0.0)
    # A value times zero is zero, unless it is NaN or infinite.
    whole = tl.sum((value.to(tl.float32) * 0.0 != 0.0).to(tl.int32), 0) == 0
    tl.store(output + row * width + columns, tl.where(whole, value, 0.0), mask=inside)
    tl.store(finite + row, whole, mask=row < rows)


def spoil(tokens: Tensor, finite: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """See `nopad.inference.padding.spoil`, which is the plain form.

    Args:
        tokens: `(T, D)`, rows one after another.
        finite: `(T,)` bool.
        offsets: `(S + 1,)` int32, of segments that hold all rows.
        longest: rows of the longest segment, or more.
    """
    rows, width = tokens.shape
    output, together = torch.empty_like(tokens), 8
    blocks = triton.cdiv(longest, together)
    if rows:
        _spoil[(blocks * (len(offsets) - 1),)](  # pyright: ignore[reportIndexIssue]
            tokens, finite, offsets, output, width, blocks, together, triton.next_power_of_2(width), num_warps=4
        )
    return output


@triton.jit(do_not_specialize=["blocks"])
def _spoil(tokens, finite, offsets, output, width, blocks, TOGETHER: tl.constexpr, BLOCK: tl.constexpr):
    segment, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, end = tl.load(offsets + segment), tl.load(offsets + segment + 1)
    row = first + block * TOGETHER
    if row < end:
        spoilt = tl.zeros((1024,), tl.int32)
        for start in range(first, end, 1024):
            place = start + tl.arange(0, 1024)
            spoilt |= (tl.load(finite + place, mask=place < end, other=1) == 0).to(tl.int32)
        whole = tl.max(spoilt, 0) == 0
        columns = tl.arange(0, BLOCK)
        for step in range(TOGETHER):
            place = (row.to(tl.int64) + step) * width + columns
            inside = (columns < width) & (row + step < end)
            value = tl.load(tokens + place, mask=inside, other=0.0)
            tl.store(output + place, tl.where(whole, value, float("nan")).to(output.dtype.element_ty), mask=inside)

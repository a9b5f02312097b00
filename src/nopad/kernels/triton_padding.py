"""Padding and NaN handling of static packs as Triton kernels; importable only where Triton is installed."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS_PER_PROGRAM = 8
"""Rows that one program of `poison_segments` copies."""


def pad_rows(tokens: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """See `nopad.inference.padding.pad_rows`, the reference in plain torch; writes to `out`."""
    num_rows, hidden_size = tokens.shape
    finite = tokens.new_empty(num_rows, dtype=torch.bool)
    block = triton.next_power_of_2(hidden_size)
    _pad_rows[(len(out),)](  # pyright: ignore[reportIndexIssue]
        tokens, out, finite, num_rows, hidden_size, block, num_warps=4
    )
    return out, finite


@triton.jit(do_not_specialize=["num_rows"])
def _pad_rows(tokens, out, finite, num_rows, hidden_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    value = tl.load(tokens + row * hidden_size + column, mask=mask & (row < num_rows), other=0.0)
    # A value times zero is zero, unless it is NaN or infinite.
    is_finite = tl.sum((value.to(tl.float32) * 0.0 != 0.0).to(tl.int32), 0) == 0
    tl.store(out + row * hidden_size + column, tl.where(is_finite, value, 0.0), mask=mask)
    tl.store(finite + row, is_finite, mask=row < num_rows)


def poison_segments(tokens: Tensor, finite: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """See `nopad.inference.padding.poison_segments`, the reference in plain torch.

    Args:
        tokens: `(T, D)`, contiguous.
        finite: `(T,)` bool.
        cu_seqlens: `(S + 1,)` int32 offsets of segments that contain all rows.
        max_seqlen: upper bound of the rows of a segment.
    """
    num_rows, hidden_size = tokens.shape
    out = torch.empty_like(tokens)
    num_blocks = triton.cdiv(max_seqlen, ROWS_PER_PROGRAM)
    if num_rows:
        block = triton.next_power_of_2(hidden_size)
        _poison_segments[(num_blocks * (len(cu_seqlens) - 1),)](  # pyright: ignore[reportIndexIssue]
            tokens, finite, cu_seqlens, out, hidden_size, num_blocks, ROWS_PER_PROGRAM, block, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["num_blocks"])
def _poison_segments(tokens, finite, cu_seqlens, out, hidden_size, num_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    segment, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    start, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    row = start + block * ROWS
    if row < end:
        nonfinite = tl.zeros((1024,), tl.int32)
        for first in range(start, end, 1024):
            index = first + tl.arange(0, 1024)
            nonfinite |= (tl.load(finite + index, mask=index < end, other=1) == 0).to(tl.int32)
        is_finite = tl.max(nonfinite, 0) == 0
        column = tl.arange(0, BLOCK)
        for step in range(ROWS):
            offset = (row.to(tl.int64) + step) * hidden_size + column
            mask = (column < hidden_size) & (row + step < end)
            value = tl.load(tokens + offset, mask=mask, other=0.0)
            tl.store(out + offset, tl.where(is_finite, value, float("nan")).to(out.dtype.element_ty), mask=mask)

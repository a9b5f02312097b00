"""Learned positions resampled to all grids of a pack by one Triton kernel; importable only with Triton installed."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 512
"""Channels per program."""


def resample(table: Tensor, weights: Tensor, spans: Tensor, index: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Position of each patch: the sum of a table's rows, weighted by the patch's row and column.

    The arguments `weights`, `spans` and `index` are what `nopad.layers.resampling.patch_weights` returns.

    Args:
        table: `(rows · columns, D)` float32.
        weights: `(M, n)` float32 weights of the table's rows or columns.
        spans: `(M, 2)` int32 range of the weights that are not zero.
        index: `(T, 2)` int64 row of `weights` for the row and for the column of each patch.
        columns: columns of the table's grid.
        dtype: dtype of the result.

    Returns:
        `(T, D)`.
    """
    hidden_size = table.shape[1]
    output = table.new_empty(len(index), hidden_size, dtype=dtype)
    if len(index):
        _resample[(len(index), triton.cdiv(hidden_size, BLOCK))](  # pyright: ignore[reportIndexIssue]
            table, weights, spans, index, output, columns, weights.shape[1], hidden_size, BLOCK, num_warps=4
        )
    return output


@triton.jit
def _resample(table, weights, spans, index, output, columns, num_taps, hidden_size, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < hidden_size
    row, column = tl.load(index + 2 * patch), tl.load(index + 2 * patch + 1)
    first_row, last_row = tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1)
    first_column, last_column = tl.load(spans + 2 * column), tl.load(spans + 2 * column + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for table_row in range(first_row, last_row):
        row_weight = tl.load(weights + row * num_taps + table_row)
        for table_column in range(first_column, last_column):
            weight = row_weight * tl.load(weights + column * num_taps + table_column)
            offset = (table_row * columns + table_column) * hidden_size + channel
            total += weight * tl.load(table + offset, mask=mask, other=0.0)
    tl.store(output + patch * hidden_size + channel, total.to(output.dtype.element_ty), mask=mask)

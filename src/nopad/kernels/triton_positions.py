"""Learned positions resized to all grids of a pack by one Triton kernel, importable only where Triton is."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 512
"""Channels at a time."""


def resized(table: Tensor, weights: Tensor, spans: Tensor, index: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Each patch's sum of a table's rows, weighted by its row and by its column; see `positions.weights_of_patches`.

    Args:
        table: `(rows · columns, D)` float32.
        weights: `(M, n)` float32, of the table's rows or columns.
        spans: `(M, 2)` int32, the first that is not zero and the first behind the last.
        index: `(T, 2)` int64, which weights are those of a patch's row and of its column.
        columns: of the table's grid.
        dtype: of the result.

    Returns:
        `(T, D)`.
    """
    width = table.shape[1]
    output = table.new_empty(len(index), width, dtype=dtype)
    if len(index):
        _resized[(len(index), triton.cdiv(width, BLOCK))](  # pyright: ignore[reportIndexIssue]
            table, weights, spans, index, output, columns, weights.shape[1], width, BLOCK, num_warps=4
        )
    return output


@triton.jit
def _resized(table, weights, spans, index, output, columns, taps, width, BLOCK: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    row, column = tl.load(index + 2 * patch), tl.load(index + 2 * patch + 1)
    first_row, last_row = tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1)
    first_column, last_column = tl.load(spans + 2 * column), tl.load(spans + 2 * column + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for above in range(first_row, last_row):
        of_row = tl.load(weights + row * taps + above)
        for beside in range(first_column, last_column):
            weight = of_row * tl.load(weights + column * taps + beside)
            place = (above * columns + beside) * width + channel
            total += weight * tl.load(table + place, mask=inside, other=0.0)
    tl.store(output + patch * width + channel, total.to(output.dtype.element_ty), mask=inside)

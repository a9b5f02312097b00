"""A product whose columns are gated before they are written, in Triton; importable only where Triton is.

cuBLAS writes gates and ups, and a pass of its own reads them again: on an H100 that takes four tenths more time than a
product in Triton that keeps them (docs/performance.md). Tiles come by the copy engine of Hopper.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

from nopad.inference.fusion.folding import FoldedBlock

ROWS, COLUMNS, TERMS = 128, 128, 64
"""Of a tile: of those that were tried on an H100 the fastest."""
TOGETHER = 8
"""Tiles above each other that are multiplied with the same columns one after another, while these are in the cache."""
ALIGNMENT = 8
"""Values of half precision in 16 bytes, from which the copy engine's rows have to start."""


def takes(block: FoldedBlock, device: torch.device) -> bool:
    """Whether `gated` can multiply a block's gates and ups."""
    columns, terms = block.up.weight.shape
    return (
        block.gated
        and torch.cuda.get_device_capability(device)[0] == 9
        and columns // 2 % ALIGNMENT == 0
        and terms % ALIGNMENT == 0
    )


def gated(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu(gate) · up` in float32 of `states @ weightᵀ + bias`, rounded once.

    Args:
        states: `(T, D)` in half precision.
        weight: `(2 · I, D)`, rows of gate and up in turn, D and I multiples of `ALIGNMENT`.
        bias: `(2 · I,)` float32 or `None`.

    Returns:
        `(T, I)`.
    """
    rows, terms = states.shape
    gate, up = weight.view(-1, 2, terms).unbind(1)
    output = states.new_empty(rows, len(gate))
    programs = torch.cuda.get_device_properties(states.device).multi_processor_count
    _gated[(programs,)](  # pyright: ignore[reportIndexIssue]
        _tiles(states, ROWS, TERMS),
        _tiles(gate, COLUMNS, TERMS),
        _tiles(up, COLUMNS, TERMS),
        _tiles(output, ROWS, COLUMNS),
        bias,
        rows,
        len(gate),
        terms,
        programs,
        ROWS,
        COLUMNS,
        TERMS,
        TOGETHER,
        num_warps=8,
        num_stages=3,
    )
    return output


def _tiles(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


@triton.jit
def _gated(
    states,
    gates,
    ups,
    output,
    bias,
    rows,
    columns,
    terms,
    programs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    above, beside = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for tile in range(tl.program_id(0), above * beside, programs):
        first = tile // (TOGETHER * beside) * TOGETHER
        within = tile % (TOGETHER * beside)
        height = tl.minimum(above - first, TOGETHER)
        row, column = (first + within % height) * ROWS, within // height * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for term in range(0, terms, TERMS):
            some = states.load([row, term])
            gate = tl.dot(some, gates.load([column, term]).T, gate)
            up = tl.dot(some, ups.load([column, term]).T, up)
        if bias is not None:
            place = column + tl.arange(0, COLUMNS)
            gate += tl.load(bias + 2 * place, mask=place < columns, other=0.0)[None, :]
            up += tl.load(bias + 2 * place + 1, mask=place < columns, other=0.0)[None, :]
        output.store([row, column], (gate * tl.sigmoid(gate) * up).to(output.dtype))

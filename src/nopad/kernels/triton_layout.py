"""Where each patch of a pack lies, by one Triton kernel, importable only where Triton is."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 1024
"""Patches at a time."""


def places(grid: Tensor, offsets: Tensor, patches: int, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `nopad.layout.places`, which is the plain form.

    Args:
        grid: `(N, 3)` int64 `[frames, rows, columns]`.
        offsets: `(N + 1,)` int32 of the images' patches.
        patches: T, of all images.
        longest: patches of the largest image.
    """
    image, index = grid.new_empty(patches), grid.new_empty(patches)
    coordinates = grid.new_empty(patches, 3)
    blocks = triton.cdiv(longest, BLOCK)
    if patches:
        _places[(blocks * len(grid),)](  # pyright: ignore[reportIndexIssue]
            grid, offsets, image, index, coordinates, blocks, BLOCK, num_warps=4
        )
    return image, index, coordinates


@triton.jit(do_not_specialize=["blocks"])
def _places(grid, offsets, image, index, coordinates, blocks, BLOCK: tl.constexpr):
    number, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, end = tl.load(offsets + number), tl.load(offsets + number + 1)
    rows, columns = tl.load(grid + 3 * number + 1).to(tl.int32), tl.load(grid + 3 * number + 2).to(tl.int32)
    own = block * BLOCK + tl.arange(0, BLOCK)
    inside, place = own < end - first, (first + own).to(tl.int64)
    row = own // columns
    tl.store(image + place, number.to(tl.int64), mask=inside)
    tl.store(index + place, own.to(tl.int64), mask=inside)
    tl.store(coordinates + 3 * place, (row // rows).to(tl.int64), mask=inside)
    tl.store(coordinates + 3 * place + 1, (row % rows).to(tl.int64), mask=inside)
    tl.store(coordinates + 3 * place + 2, (own % columns).to(tl.int64), mask=inside)

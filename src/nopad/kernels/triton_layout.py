"""Image index and coordinates of each patch by one Triton kernel; importable only where Triton is installed."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

BLOCK = 1024
"""Patches per program."""


def locate_patches(
    grid: Tensor, cu_seqlens: Tensor, num_patches: int, max_seqlen: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `nopad.layout.locate_patches`, the reference in plain torch.

    Args:
        grid: `(N, 3)` int64 `[frames, rows, columns]`.
        cu_seqlens: `(N + 1,)` int32 offsets of the images.
        num_patches: T, of all images.
        max_seqlen: patches of the largest image.
    """
    image, index = grid.new_empty(num_patches), grid.new_empty(num_patches)
    coordinates = grid.new_empty(num_patches, 3)
    num_blocks = triton.cdiv(max_seqlen, BLOCK)
    if num_patches:
        _locate_patches[(num_blocks * len(grid),)](  # pyright: ignore[reportIndexIssue]
            grid, cu_seqlens, image, index, coordinates, num_blocks, BLOCK, num_warps=4
        )
    return image, index, coordinates


@triton.jit(do_not_specialize=["num_blocks"])
def _locate_patches(grid, cu_seqlens, image, index, coordinates, num_blocks, BLOCK: tl.constexpr):
    segment, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    start, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    rows, columns = tl.load(grid + 3 * segment + 1).to(tl.int32), tl.load(grid + 3 * segment + 2).to(tl.int32)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    mask, patch = offset < end - start, (start + offset).to(tl.int64)
    row = offset // columns
    tl.store(image + patch, segment.to(tl.int64), mask=mask)
    tl.store(index + patch, offset.to(tl.int64), mask=mask)
    tl.store(coordinates + 3 * patch, (row // rows).to(tl.int64), mask=mask)
    tl.store(coordinates + 3 * patch + 1, (row % rows).to(tl.int64), mask=mask)
    tl.store(coordinates + 3 * patch + 2, (offset % columns).to(tl.int64), mask=mask)

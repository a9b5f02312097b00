"""Neighbouring tokens side by side, as projectors of vision-language models take them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nopad.counts import check_count

if TYPE_CHECKING:
    from nopad.packing import Pack


def merge(tokens: Tensor, pack: Pack | Tensor, factor: int = 2) -> Tensor:
    """Concatenate the channels of each `factor × factor` block of neighbouring tokens.

    Blocks follow each other row by row, frame by frame, and so do the tokens of a block: top left, top right, bottom
    left, bottom right. In transformers' code that is the input of the MLP in `PatchMerger` of Qwen2-VL, and what
    `pixel_shuffle` of InternVL and Idefics3 and `pixel_unshuffle` of LFM2-VL return.

    Args:
        tokens: `(T, D)` of a pack, of any layer.
        pack: the pack, or its `grid_thw`, whose rows and columns are multiples of `factor`.
        factor: side of a block.

    Returns:
        `(T / factor², D · factor²)`.

    Raises:
        ValueError: rows or columns that `factor` does not divide, not one token per patch, or `patch_positions`, with
            which patches may be missing.
    """
    positions = None if isinstance(pack, Tensor) else pack.patch_positions
    grid_thw = (pack if isinstance(pack, Tensor) else pack.grid_thw).cpu().long()
    lengths = torch.tensor(merged_lengths(grid_thw, factor, positions), dtype=torch.int64) * factor**2
    num_tokens = int(lengths.sum())
    if tokens.ndim != 2 or len(tokens) != num_tokens:
        raise ValueError(f"tokens: expected ({num_tokens}, D), a row per patch, got shape {tuple(tokens.shape)}")
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    _, rows, columns = grid_thw.repeat_interleave(lengths, dim=0).unbind(1)
    source = starts + place_in_rows(torch.arange(num_tokens) - starts, rows, columns, factor)
    return tokens.index_select(0, source.to(tokens.device)).view(-1, tokens.shape[1] * factor**2)


def place_in_rows(place: Tensor, rows: Tensor, columns: Tensor, factor: int) -> Tensor:
    """Where a token lies row by row, frame by frame, that has this place block by block.

    Args:
        place: `(T,)` place of each token in its image.
        rows, columns: `(T,)` of that image, multiples of `factor`.
        factor: side of a block.

    Returns:
        `(T,)`.
    """
    # Mixed-radix digits of the place, last first: column and row in the block, then those of the block.
    digits = []
    for radix in (factor, factor, columns // factor, rows // factor):
        digits.append(place % radix)
        place = place // radix
    column, row, block_column, block_row = digits
    return (place * rows + block_row * factor + row) * columns + block_column * factor + column


def merged_lengths(grid_thw: Tensor, factor: int, patch_positions: Tensor | None) -> list[int]:
    """Tokens of each image after `merge`.

    Raises:
        ValueError: see `merge`.
    """
    check_count("merge", factor)
    if factor > 1 and patch_positions is not None:
        raise ValueError(
            f"merge: blocks of {factor} × {factor} need whole grids, got a pack with patch_positions; merge by 1"
        )
    grid = grid_thw.tolist()
    for index, (_, rows, columns) in enumerate(grid):
        if rows % factor or columns % factor:
            raise ValueError(
                f"merge: expected rows and columns that are multiples of {factor}, got {rows} × {columns} in image "
                f"{index}; multiple_of={factor} of nopad.load, nopad.processor and encoder.pack makes them so"
            )
    return [frames * rows * columns // factor**2 for frames, rows, columns in grid]

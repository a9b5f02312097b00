"""Windows of an image's patches, which attend to themselves in some layers of a model."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.layout import Layout
from nopad.segments import Segments, TracedSegments, Windows
from nopad.traced import TracedLayout


@dataclasses.dataclass(frozen=True)
class WindowLayout:
    """Rows of a pack window by window: the tokens of a window are consecutive, and so are those of a frame.

    Attributes:
        segments: `Segments` or `TracedSegments`, one per image or frame, with their `windows`.
        patches: `(T,)` row of each patch.
    """

    segments: Any
    patches: Tensor

    @classmethod
    def of(cls, layout: Layout | TracedLayout, side: int, merge_size: int) -> WindowLayout:
        """Windows of `side × side` patches from the top left of each frame; no host read.

        Args:
            layout: of full grids, whose rows and columns are multiples of `merge_size`.
            side: patches, a multiple of `merge_size`; windows at the right and at the bottom may have fewer.
            merge_size: side of a block of patches, which bounds the number of windows from above.
        """
        _, rows, columns = layout.grid_thw[layout.image_index].unbind(1)
        _, row, column = layout.coordinates.unbind(1)
        top, left = row - row % side, column - column % side
        height, width = (rows - top).clamp(max=side), (columns - left).clamp(max=side)
        # A frame has `top` whole rows above a window; beside it, in its band of windows, `left` columns.
        first = layout.frames.cu_seqlens[:-1].long()[layout.frame_index] + top * columns + left * height
        patches = first + (row - top) * width + column - left
        segments: Any = layout.frames
        if isinstance(layout, TracedLayout):
            starts = first[(row == top) & (column == left)].sort().values
            offsets = torch.cat((starts, starts.new_full((1,), layout.num_patches))).int()
            windows = TracedSegments(offsets, layout.num_patches)
            segments = TracedSegments(segments.cu_seqlens, layout.num_patches, windows)
            return cls(segments, patches)
        lengths = [n for frames, *grid in layout.grid for n in window_lengths(*grid, side) * frames]
        return cls(with_windows(segments, lengths, side, merge_size), patches)

    def to_rows(self, tokens: Tensor) -> Tensor:
        """Tokens of the patches `(T, …)`, window by window."""
        order = torch.empty_like(self.patches)
        order[self.patches] = torch.arange(len(order), device=order.device)
        return tokens.index_select(0, order)

    def to_patches(self, rows: Tensor) -> Tensor:
        """The rows of the patches, `(T, …)` in the order of the pack."""
        return rows.index_select(0, self.patches)


def windows_of_one_segment(length: int, side: int, merge_size: int, device: torch.device) -> Segments:
    """One segment of so many tokens, in as few windows as there may be."""
    lengths = [min(side**2, length - start) for start in range(0, length, side**2)]
    return with_windows(Segments.of([length], device), lengths, side, merge_size)


def with_windows(segments: Segments, lengths: list[int], side: int, merge_size: int) -> Segments:
    """Segments with windows of these lengths, of at most `side²` tokens each; see `WindowLayout.of`."""
    windows = Segments.of(lengths, segments.cu_seqlens.device)
    # With k = side / merge_size blocks along a window, a frame of a × b blocks has ⌈a / k⌉ · ⌈b / k⌉ windows, which is
    # at most 1 + (a · b - 1) / k.
    stride = side * merge_size
    return dataclasses.replace(segments, windows=Windows(windows.lengths, windows.cu_seqlens, side**2, stride=stride))


@lru_cache(maxsize=1024)
def window_lengths(rows: int, columns: int, side: int) -> tuple[int, ...]:
    """Patches of each window of a frame."""
    heights, widths = ([min(side, length - start) for start in range(0, length, side)] for length in (rows, columns))
    return tuple(height * width for height in heights for width in widths)

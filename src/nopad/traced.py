"""The layout of a pack in a graph of `torch.export`, where the values of `grid_thw` are not known.

`nopad.layout` has them on the host. Here everything is computed by tensor operations, so that the exported graph takes
any grid that adds up to its patches. Attributes are those of `Layout`, all made at once: torch's compiler traces no
`cached_property`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from nopad.layout import check_arguments, locate_patches
from nopad.segments import TracedSegments


class TracedLayout:
    """See `nopad.layout.Layout`.

    Args:
        hidden_states: `(T, P)` patches.
        grid_thw: `(N, 3)` integers.
        patch_positions: `(T, 3)` integers or `None`.
        patch_dim: the encoder's P.

    Raises:
        ValueError: see `Layout.read`; what depends on values is checked when the graph runs, that the patches of a
            frame are consecutive is not.
    """

    longest_side = sys.maxsize

    def __init__(self, hidden_states: Tensor, grid_thw: Tensor, patch_positions: Tensor | None, patch_dim: int) -> None:
        check_arguments(hidden_states, grid_thw, patch_positions, patch_dim)
        self.device = hidden_states.device
        self.num_patches = hidden_states.shape[0]
        self.grid_thw = grid_thw.to(self.device).long()
        areas = self.grid_thw[:, 1] * self.grid_thw[:, 2]
        lengths = self.grid_thw[:, 0] * areas
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage] - torch._check reads the host
        check((self.grid_thw >= 1).all(), "grid_thw: expected integers ≥ 1")
        largest = torch.cat((self.grid_thw.flatten(), areas)).amax()  # or int64 products of three would overflow
        check(largest <= self.num_patches, "grid_thw: does not add up to the rows of hidden_states")
        check(lengths.sum() == self.num_patches, "grid_thw: does not add up to the rows of hidden_states")
        self.images = TracedSegments(_offsets(lengths), self.num_patches)
        self.image_index, self.index_in_image, self.coordinates = locate_patches(self.grid_thw, self.images)
        self.patch_positions = None if patch_positions is None else patch_positions.long()
        if self.patch_positions is not None:
            check((self.patch_positions >= 0).all(), "patch_positions: expected integers ≥ 0")
            self.coordinates = self.patch_positions
        time = self.coordinates[:, 0]
        changes = (self.image_index != self.image_index.roll(1)) | (time != time.roll(1))
        changes |= torch.arange(self.num_patches, device=self.device) == 0
        starts = changes.nonzero().flatten()
        end = starts.new_full((1,), self.num_patches)
        self.frames = TracedSegments(torch.cat((starts, end)).int(), self.num_patches)
        self.frame_index = self.frames.index()
        images = torch.arange(self.images.num_segments + 1, device=self.device)
        num_frames = torch.searchsorted(self.image_index[starts], images).int()
        self.frames_per_image = TracedSegments(num_frames, self.frames.num_segments)

    def check_on_grid(self, rows: int, columns: int) -> None:
        """See `Layout`; when the graph runs."""
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        _, row, column = self.coordinates.unbind(1)
        on_grid = (row < rows).all() & (column < columns).all()
        check(on_grid, f"patch_positions: expected rows and columns on the trained {rows} × {columns} grid")

    def check_frames(self, limit: int) -> None:
        """See `Layout`; when the graph runs."""
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check((self.grid_thw[:, 0] <= limit).all(), f"grid_thw: expected clips of at most {limit} frames")

    def check_multiple(self, size: int) -> None:
        """See `Layout`; when the graph runs."""
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check((self.grid_thw[:, 1:] % size == 0).all(), f"grid_thw: expected multiples of {size} rows and columns")


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(dim=0))).int()

"""Segments, frames and coordinates of a pack, from one read of `grid_thw`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from nopad.counts import counted
from nopad.kernels.availability import has_triton
from nopad.segments import MAX_TOKENS, Segments, TracedSegments


@dataclasses.dataclass(frozen=True)
class Layout:
    """Metadata of a pack, computed from `grid_thw` with one device-to-host copy. Nothing downstream synchronises.

    Attributes:
        grid: `(frames, rows, columns)` of each image or clip.
        frame_lengths: number of patches of each frame, for each image or clip.
        frames_whole: whether the patches of each frame are consecutive.
        extent: exclusive upper bounds of the rows and of the columns.
        device: device of the tokens.
        patch_positions: `(T, 3)` `[t, h, w]` of each patch, where they do not follow from the grid.
    """

    grid: tuple[tuple[int, int, int], ...]
    frame_lengths: tuple[tuple[int, ...], ...]
    frames_whole: bool
    extent: tuple[int, int]
    device: torch.device
    patch_positions: Tensor | None = None

    @classmethod
    def of_grid(cls, grid: Sequence[Sequence[int]], device: torch.device) -> Layout:
        """A pack of full grids `[frames, rows, columns]`."""
        frame_lengths = tuple((h * w,) * t for t, h, w in grid)
        extent = max((h for _, h, _ in grid), default=0), max((w for *_, w in grid), default=0)
        return cls(tuple((t, h, w) for t, h, w in grid), frame_lengths, True, extent, device)

    @classmethod
    def of_image(cls, rows: int, columns: int, device: torch.device) -> Layout:
        """A pack of one image."""
        return cls.of_grid([(1, rows, columns)], device)

    @classmethod
    def read(cls, hidden_states: Tensor, grid_thw: Tensor, patch_positions: Tensor | None, patch_dim: int) -> Layout:
        """Check the arguments of a forward and copy the grid to the host, the one host read.

        Args:
            hidden_states: `(T, P)` patches.
            grid_thw: `(N, 3)` integers ≥ 1, on the CPU or on the device of `hidden_states`.
            patch_positions: `None`, or `(T, 3)` on the device of `hidden_states`.
            patch_dim: the encoder's P.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device, or the patches do not add up to the grid.
        """
        check_arguments(hidden_states, grid_thw, patch_positions, patch_dim)
        grid = tuple((t, h, w) for t, h, w in grid_thw.tolist())
        for index, row in enumerate(grid):
            if min(row) < 1:
                raise ValueError(f"grid_thw: expected integers ≥ 1, got {list(row)} in row {index}")
        total = sum(t * h * w for t, h, w in grid)
        if total != hidden_states.shape[0]:
            raise ValueError(
                f"grid_thw: expected {counted(len(hidden_states), 'patch')} in all, one per row of hidden_states, "
                f"got {total} in {counted(len(grid), 'row')}"
            )
        if total > MAX_TOKENS:
            raise ValueError(f"grid_thw: expected at most {MAX_TOKENS} patches in a pack, got {total}; split it")
        if patch_positions is None:
            return cls.of_grid(grid, hidden_states.device)
        patch_positions = patch_positions.long()  # uint8 would index as a mask, and products of int8 overflow
        if not total:
            return dataclasses.replace(cls.of_grid(grid, hidden_states.device), patch_positions=patch_positions)
        of_frames = _read_positions(patch_positions, [t * h * w for t, h, w in grid])
        return cls(grid, *of_frames, hidden_states.device, patch_positions)

    def check_multiple(self, size: int) -> None:
        """Raise `ValueError` unless all rows and columns are multiples of `size`."""
        for index, (_, rows, columns) in enumerate(self.grid):
            if rows % size or columns % size:
                raise ValueError(
                    f"grid_thw: expected rows and columns that are multiples of {size}, whose blocks the model merges, "
                    f"got {rows} × {columns} in row {index}; multiple_of={size} makes them so, as it does in this "
                    f"encoder's own rule"
                )

    def check_frames(self, limit: int) -> None:
        """Raise `ValueError` unless all clips have at most `limit` frames."""
        longest = max((frames for frames, _, _ in self.grid), default=0)
        if longest > limit:
            raise ValueError(
                f"grid_thw: expected clips of at most {limit} frames, for which the model has positions, got "
                f"{longest}; cut the clip"
            )

    def check_on_grid(self, rows: int, columns: int) -> None:
        """Raise `ValueError` unless all `patch_positions` are on a trained grid."""
        if self.extent[0] > rows or self.extent[1] > columns:
            raise ValueError(
                f"patch_positions: expected rows and columns on the trained {rows} × {columns} grid, "
                f"got rows up to {self.extent[0] - 1} and columns up to {self.extent[1] - 1}"
            )

    @property
    def longest_side(self) -> int:
        """Exclusive upper bound of all rows and columns."""
        return max(self.extent)

    @cached_property
    def num_patches(self) -> int:
        """Number of patches, by the grid."""
        return sum(t * h * w for t, h, w in self.grid)

    @cached_property
    def images(self) -> Segments:
        """One segment per image or clip, patches only."""
        return Segments.of([t * h * w for t, h, w in self.grid], self.device)

    @cached_property
    def frames(self) -> Segments:
        """One segment per image or frame, patches only.

        Raises:
            ValueError: by `patch_positions`, the patches of a frame are not consecutive.
        """
        if not self.frames_whole:
            raise ValueError(
                "patch_positions: expected the patches of a frame one after another, got a t that comes back; "
                "this encoder attends within frames"
            )
        lengths = tuple(length for lengths in self.frame_lengths for length in lengths)
        return self.images if lengths == self.images.lengths else Segments.of(lengths, self.device)

    @cached_property
    def frame_index(self) -> Tensor:
        """Index of each patch's frame in the pack, `(T,)` int64 on the device; raises as `frames` does."""
        return self.image_index if self.frames is self.images else self.frames.index()

    @cached_property
    def frames_per_image(self) -> Segments:
        """Frames of each image or clip, as segments of frames."""
        return Segments.of([len(lengths) for lengths in self.frame_lengths], self.device)

    @cached_property
    def image_index(self) -> Tensor:
        """Index of each patch's image, `(T,)` int64 on the device."""
        return self._patch_locations[0]

    @cached_property
    def index_in_image(self) -> Tensor:
        """Index of each patch within its image or clip, `(T,)` int64 on the device."""
        return self._patch_locations[1]

    @cached_property
    def coordinates(self) -> Tensor:
        """`[t, h, w]` of each patch, `(T, 3)` on the device: `patch_positions` where given, else from the grid."""
        return self._patch_locations[2] if self.patch_positions is None else self.patch_positions

    @cached_property
    def grid_thw(self) -> Tensor:
        """`grid` as `(N, 3)` int64 on the device."""
        return torch.tensor(self.grid, dtype=torch.int64).reshape(-1, 3).to(self.device, non_blocking=True)

    @cached_property
    def _patch_locations(self) -> tuple[Tensor, Tensor, Tensor]:
        if not has_triton(self.device):
            return locate_patches(self.grid_thw, self.images)
        from nopad.kernels import triton_layout

        images = self.images
        return triton_layout.locate_patches(self.grid_thw, images.cu_seqlens, self.num_patches, images.max_seqlen)


def locate_patches(grid: Tensor, images: Segments | TracedSegments) -> tuple[Tensor, Tensor, Tensor]:
    """Image index and coordinates of each patch of full grids.

    Args:
        grid: `(N, 3)` int64 `[frames, rows, columns]`.
        images: one segment per row of `grid`.

    Returns:
        For each patch the index of its image `(T,)`, its index within that image `(T,)` and its `[t, h, w]` `(T, 3)`,
        int64.
    """
    image = images.index()
    index = torch.arange(images.num_tokens, device=grid.device) - images.cu_seqlens[:-1].long()[image]
    _, rows, columns = grid[image].unbind(1)
    return image, index, torch.stack((index // (rows * columns), index // columns % rows, index % columns), dim=1)


def check_arguments(hidden_states: Tensor, grid_thw: Tensor, patch_positions: Tensor | None, patch_dim: int) -> None:
    """Check shapes, dtypes and devices of the arguments of a forward; no host read.

    Raises:
        ValueError: one of them is wrong.
    """
    if hidden_states.ndim != 2 or hidden_states.shape[1] != patch_dim:
        raise ValueError(f"hidden_states: expected shape (T, {patch_dim}), got {tuple(hidden_states.shape)}")
    if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not _is_integer(grid_thw):
        raise ValueError(f"grid_thw: expected (N, 3) integers, got shape {tuple(grid_thw.shape)} of {grid_thw.dtype}")
    if grid_thw.device not in (hidden_states.device, torch.device("cpu")):
        raise ValueError(
            f"grid_thw: expected on the CPU or on {hidden_states.device} like hidden_states, got {grid_thw.device}"
        )
    if patch_positions is not None:
        if patch_positions.shape != (hidden_states.shape[0], 3):
            raise ValueError(
                f"patch_positions: expected shape ({hidden_states.shape[0]}, 3), a [t, h, w] for each row of "
                f"hidden_states, got {tuple(patch_positions.shape)}"
            )
        if not _is_integer(patch_positions):
            raise ValueError(f"patch_positions: expected integers, got {patch_positions.dtype}")
        if patch_positions.device != hidden_states.device:
            raise ValueError(
                f"patch_positions: expected on {hidden_states.device} like hidden_states, got {patch_positions.device}"
            )


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _read_positions(
    patch_positions: Tensor, lengths: Sequence[int]
) -> tuple[tuple[tuple[int, ...], ...], bool, tuple[int, int]]:
    """`frame_lengths`, `frames_whole` and `extent` of `Layout`, read from `patch_positions` on the host.

    Raises:
        ValueError: a negative position.
    """
    minima, maxima = torch.stack(patch_positions.aminmax(dim=0)).tolist()
    if min(minima) < 0:
        raise ValueError(f"patch_positions: expected [t, h, w] ≥ 0, got a minimum of {minima}")
    image, time = Segments.of(lengths, patch_positions.device).index(), patch_positions[:, 0]
    begins = torch.ones_like(time, dtype=torch.bool)
    begins[1:] = (image.diff() != 0) | (time.diff() != 0)
    starts = begins.nonzero().flatten()
    counts = starts.diff(append=starts.new_tensor([len(time)]))
    runs = torch.stack((image[starts], time[starts], counts)).T.tolist()
    frame_lengths: list[list[int]] = [[] for _ in lengths]
    for number, _, count in runs:
        frame_lengths[number].append(count)
    frames = {(number, frame) for number, frame, _ in runs}
    return tuple(map(tuple, frame_lengths)), len(frames) == len(runs), (maxima[1] + 1, maxima[2] + 1)

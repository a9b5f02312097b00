"""Where everything lies in a pack: segments, frames and coordinates, from one read of the grid."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.segments import Segments


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one reading of `grid_thw` tells about a pack; below it nothing reads from the device.

    Attributes:
        grid: `(frames, rows, columns)` of each image or clip.
        frame_lengths: for each image or clip, the patches of each of its frames, as they follow each other.
        frames_whole: whether the patches of each frame stand together.
        longest_side: rows and columns are all below this number.
        device: where the tokens are.
        patch_positions: `(T, 3)` `[t, h, w]` of each patch where the grid does not tell them.
    """

    grid: tuple[tuple[int, int, int], ...]
    frame_lengths: tuple[tuple[int, ...], ...]
    frames_whole: bool
    longest_side: int
    device: torch.device
    patch_positions: Tensor | None = None

    @classmethod
    def of_image(cls, rows: int, columns: int, device: torch.device) -> Layout:
        """A pack of one image."""
        return cls(((1, rows, columns),), ((rows * columns,),), True, max(rows, columns), device)

    @classmethod
    def read(cls, hidden_states: Tensor, grid_thw: Tensor, patch_positions: Tensor | None, patch_dim: int) -> Layout:
        """Check the arguments of a forward and take the grid to the host: the one host read.

        Args:
            hidden_states: `(T, P)` patches.
            grid_thw: `(N, 3)` integers ≥ 1, on the CPU or on the device of `hidden_states`.
            patch_positions: `None`, or `(T, 3)` on the device of `hidden_states`.
            patch_dim: the P that the encoder takes.

        Raises:
            ValueError: an argument of another shape, dtype or device, or patches that do not add up to the grid.
        """
        if hidden_states.ndim != 2 or hidden_states.shape[1] != patch_dim:
            raise ValueError(f"hidden_states: expected shape (T, {patch_dim}), got {tuple(hidden_states.shape)}")
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or not _holds_integers(grid_thw):
            raise ValueError(
                f"grid_thw: expected (N, 3) integers, got shape {tuple(grid_thw.shape)} of {grid_thw.dtype}"
            )
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
            if not _holds_integers(patch_positions):
                raise ValueError(f"patch_positions: expected integers, got {patch_positions.dtype}")
            if patch_positions.device != hidden_states.device:
                raise ValueError(
                    f"patch_positions: expected on {hidden_states.device} like hidden_states, "
                    f"got {patch_positions.device}"
                )
        grid = tuple((t, h, w) for t, h, w in grid_thw.tolist())
        for number, row in enumerate(grid):
            if min(row) < 1:
                raise ValueError(f"grid_thw: expected integers ≥ 1, got {list(row)} in row {number}")
        total = sum(t * h * w for t, h, w in grid)
        if total != hidden_states.shape[0]:
            raise ValueError(
                f"grid_thw: its {len(grid)} rows add up to {total} patches, "
                f"but hidden_states has {hidden_states.shape[0]} rows"
            )
        if patch_positions is not None and total:
            frame_lengths, frames_whole, longest_side = _read_positions(
                patch_positions, [t * h * w for t, h, w in grid]
            )
        else:
            frame_lengths, frames_whole = tuple((h * w,) * t for t, h, w in grid), True
            longest_side = max((side for row in grid for side in row[1:]), default=0)
        return cls(grid, frame_lengths, frames_whole, longest_side, hidden_states.device, patch_positions)

    @cached_property
    def num_patches(self) -> int:
        """Patches that the grid promises."""
        return sum(t * h * w for t, h, w in self.grid)

    @cached_property
    def images(self) -> Segments:
        """One segment per image or clip, patches only."""
        return Segments.of([t * h * w for t, h, w in self.grid], self.device)

    @cached_property
    def frames(self) -> Segments:
        """One segment per image or frame, patches only.

        Raises:
            ValueError: `patch_positions` scatter the patches of a frame.
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
        """Number of each patch's frame in the pack, `(T,)` int64 on the device; see `frames`."""
        return self.image_index if self.frames is self.images else self.frames.index()

    @cached_property
    def frames_per_image(self) -> Segments:
        """How many frames each image or clip has, as segments of frames."""
        return Segments.of([len(lengths) for lengths in self.frame_lengths], self.device)

    @cached_property
    def image_index(self) -> Tensor:
        """Image number of each patch, `(T,)` int64 on the device."""
        return self._places[0]

    @cached_property
    def index_in_image(self) -> Tensor:
        """Place of each patch within its image or clip, `(T,)` int64 on the device."""
        return self._places[1]

    @cached_property
    def coordinates(self) -> Tensor:
        """`[t, h, w]` of each patch, `(T, 3)` on the device: `patch_positions` where given, else from the grid."""
        return self._places[2] if self.patch_positions is None else self.patch_positions

    @cached_property
    def grid_thw(self) -> Tensor:
        """`grid` as `(N, 3)` int64 on the device."""
        return torch.tensor(self.grid, dtype=torch.int64).reshape(-1, 3).to(self.device, non_blocking=True)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        if not has_triton(self.device):
            return places(self.grid_thw, self.images)
        from nopad.kernels import triton_layout

        return triton_layout.places(self.grid_thw, self.images.cu_seqlens, self.num_patches, self.images.max_seqlen)


def places(grid: Tensor, images: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """Where the patches of whole grids lie.

    Args:
        grid: `(N, 3)` int64 `[frames, rows, columns]`.
        images: their segments.

    Returns:
        Image number `(T,)`, place within the image `(T,)` and `[t, h, w]` `(T, 3)` of each patch, int64.
    """
    image = images.index()
    index = torch.arange(images.num_tokens, device=grid.device) - images.cu_seqlens[:-1].long()[image]
    _, rows, columns = grid[image].unbind(1)
    return image, index, torch.stack((index // (rows * columns), index // columns % rows, index % columns), dim=1)


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _read_positions(patch_positions: Tensor, lengths: Sequence[int]) -> tuple[tuple[tuple[int, ...], ...], bool, int]:
    """Frames, whether they are whole, and longest side, read off `patch_positions`: small reads of the host.

    Raises:
        ValueError: a negative position.
    """
    low, high = torch.stack(patch_positions.aminmax(dim=0)).tolist()
    if min(low) < 0:
        raise ValueError(f"patch_positions: expected [t, h, w] ≥ 0, got a minimum of {low}")
    image = Segments.of(lengths, patch_positions.device).index()
    span = high[0] + 1
    runs = torch.unique_consecutive(image * span + patch_positions[:, 0], return_counts=True)
    frames, counts = torch.stack(runs).tolist()
    per_image: list[list[int]] = [[] for _ in lengths]
    for frame, count in zip(frames, counts, strict=True):
        per_image[frame // span].append(count)
    return tuple(map(tuple, per_image)), len(set(frames)) == len(frames), max(high[1:]) + 1

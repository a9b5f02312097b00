"""Patches: how an image or a clip is cut into them, and put together again.

Shape letters are those of `nopad.packing`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from nopad.counts import check_count, is_count

PatchOrder = Literal["hwc", "chw"]
"""Layout inside a patch: `"hwc"` is `(ph, pw, C)`, `"chw"` is `(C, ph, pw)`; of a patch of several frames
`(frames, ph, pw, C)` and `(C, frames, ph, pw)`."""


def check_patch_order(order: str) -> None:
    """Raise `ValueError` unless `order` is a known patch order."""
    if order not in get_args(PatchOrder):
        raise ValueError(f"patch order: expected 'hwc' or 'chw', got {order!r}")


def patchify(
    pixels: Tensor, patch_size: int, order: PatchOrder = "hwc", temporal_patch_size: int = 1
) -> tuple[Tensor, tuple[int, int, int]]:
    """Cut an image or a clip into flattened patches, row by row, frame by frame.

    Args:
        pixels: `(C, H, W)` for an image, `(frames, C, H, W)` for a clip.
        patch_size: side of a patch in pixels; must divide H and W.
        order: layout inside a patch.
        temporal_patch_size: frames of a patch. The last frame, or that of an image, is repeated until it fills one, as
            in transformers' processors of Qwen-VL.

    Returns:
        Patches `(t * rows * columns, P)` with `P = temporal_patch_size · patch_size² · C`, and the grid
        `(t, rows, columns)`, where t is the number of frames divided by `temporal_patch_size`, rounded up.

    Raises:
        ValueError: wrong number of dimensions, an empty side, or a side that `patch_size` does not divide.
    """
    check_patch_order(order)
    check_count("patch_size", patch_size)
    check_count("temporal_patch_size", temporal_patch_size)
    if pixels.ndim not in (3, 4):
        raise ValueError(f"pixels: expected (C, H, W) or (frames, C, H, W), got shape {tuple(pixels.shape)}")
    clip = pixels if pixels.ndim == 4 else pixels.unsqueeze(0)
    frames, channels, height, width = clip.shape
    if min(clip.shape) < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"pixels: expected height and width to be positive multiples of patch_size {patch_size}, "
            f"got shape {tuple(pixels.shape)}; resize or crop first"
        )
    if missing := -frames % temporal_patch_size:
        clip = torch.cat((clip, clip[-1:].expand(missing, -1, -1, -1)))
    rows, columns, times = height // patch_size, width // patch_size, len(clip) // temporal_patch_size
    if order == "hwc" and clip.stride(1) == 1:  # decoded pixels: whole rows of a patch are copied
        lines = clip.permute(0, 2, 3, 1)
        lines = lines.reshape(times, temporal_patch_size, rows, patch_size, columns, patch_size * channels)
        cut = lines.permute(0, 2, 4, 1, 3, 5)
    else:
        cut = clip.reshape(times, temporal_patch_size, channels, rows, patch_size, columns, patch_size)
        cut = cut.permute(0, 3, 5, 1, 4, 6, 2) if order == "hwc" else cut.permute(0, 3, 5, 2, 1, 4, 6)
    patch_dim = temporal_patch_size * channels * patch_size**2
    return cut.reshape(times * rows * columns, patch_dim), (times, rows, columns)


def unpatchify(
    patches: Tensor,
    grid: tuple[int, int, int],
    patch_size: int,
    order: PatchOrder = "hwc",
    temporal_patch_size: int = 1,
) -> Tensor:
    """Put the patches of one image or clip together again: the inverse of `patchify`.

    Args:
        patches: `(t * rows * columns, P)`.
        grid: `(t, rows, columns)`.
        patch_size: side of a patch in pixels.
        order: layout inside a patch.
        temporal_patch_size: frames of a patch.

    Returns:
        `(C, H, W)` for one frame, `(t · temporal_patch_size, C, H, W)` for more, among them those that `patchify` has
        repeated.

    Raises:
        ValueError: a grid that is not three integers ≥ 1, patches that do not fill it, or a `P` that is no multiple of
            `temporal_patch_size · patch_size²`.
    """
    check_patch_order(order)
    check_count("temporal_patch_size", temporal_patch_size)
    if len(grid) != 3 or not all(map(is_count, (*grid, patch_size))):
        raise ValueError(
            f"grid: expected (frames, rows, columns) ≥ 1 of patches of patch_size ≥ 1, "
            f"got {tuple(grid)} and patch_size {patch_size}"
        )
    times, rows, columns = grid
    area = temporal_patch_size * patch_size**2
    if patches.ndim != 2 or patches.shape[0] != times * rows * columns or patches.shape[1] % area:
        raise ValueError(
            f"patches: expected ({times * rows * columns}, C * {area}) for grid {tuple(grid)} "
            f"and patch_size {patch_size}, got shape {tuple(patches.shape)}"
        )
    channels, inside = patches.shape[1] // area, (temporal_patch_size, patch_size, patch_size)
    if order == "hwc":
        cut = patches.reshape(times, rows, columns, *inside, channels).permute(0, 3, 6, 1, 4, 2, 5)
    else:
        cut = patches.reshape(times, rows, columns, channels, *inside).permute(0, 4, 3, 1, 5, 2, 6)
    clip = cut.reshape(times * temporal_patch_size, channels, rows * patch_size, columns * patch_size)
    return clip[0] if len(clip) == 1 else clip

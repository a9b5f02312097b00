"""Inputs of an alignment: seeded noise of several sizes, and photos."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nopad.counts import counted
from nopad.embedding.inputs.names import suffix_of
from nopad.embedding.inputs.walk import Hidden, walk
from nopad.encoder import PackedEncoder
from nopad.patches import unpatchify
from nopad.preprocessing.formats import image_suffixes

Case = tuple[str, list[Tensor]]
"""A name, and normalised pixels `(C, H, W)` of images or `(frames, C, H, W)` of clips that share a pack."""


def noise_cases(
    packed: PackedEncoder, only_grid: tuple[int, int] | None, batch_size: int, image_size: int | None
) -> tuple[list[Case], list[str]]:
    """Cases of seeded noise, and what cannot be compared because the reference takes `only_grid` alone."""
    size, multiple = packed.patch_size, packed.merge_size
    side = 16 if image_size is None else image_size // size
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        *frames, rows, columns = shape
        rows, columns = (length + -length % multiple for length in (rows, columns))
        shape = *frames, packed.config.num_channels, rows * size, columns * size
        return torch.randn(shape, dtype=torch.float32, generator=generator)

    one_size = [make(*(only_grid or (side, side))) for _ in range(batch_size)]
    if only_grid is not None:
        clip = make(3, *only_grid)
        cases = [
            (f"{only_grid[0]} × {only_grid[1]} patches, batched", one_size),
            ("a clip of 3 frames", [clip]),
            ("images and a clip in one pack", [*one_size, clip]),
            ("the same pack in another order", [clip, *reversed(one_size)]),
        ]
        return cases, [f"several sizes: the reference takes {only_grid[0]} × {only_grid[1]} patches and nothing else"]
    several = [make(*grid) for grid in ((8, 8), (5, 17), (14, 6), (1, 60))]
    # Many of them: in half precision one token's distance is chance.
    single = [make(1, 1) for _ in range(64)]
    clip = make(3, 9, 12)
    mixed = [*several[:3], clip, single[0], several[3]]
    return [
        (f"{side} × {side} patches, batched", one_size),
        *((" × ".join(str(pixels // size) for pixels in image.shape[1:]) + " patches", [image]) for image in several),
        ("64 images of one patch" if multiple == 1 else f"64 images of {multiple} × {multiple} patches", single),
        ("a clip of 3 frames", [clip]),
        ("all sizes in one pack", mixed),
        ("the same pack in another order", [mixed[i] for i in (4, 2, 0, 5, 3, 1)]),
    ], []


def photo_case(packed: PackedEncoder, photos: Sequence[Any], image_size: int | None) -> Case:
    """All photos in one pack, by the model's own rule or, with `image_size`, as squares of so many pixels."""
    rule = packed.preprocessing
    if image_size is not None:
        short_side = rule.short_side if (rule.short_side or 0) > image_size else None
        sizes = {"size": image_size, "short_side": short_side, "min_patches": None, "max_patches": None}
        rule = dataclasses.replace(rule, rule="crop", **sizes)
    pack = packed.pack(photos, resize="pil", preprocessing=rule).to("cpu", torch.float32)
    parts = pack.hidden_states.split(pack.grid_thw.prod(dim=1).tolist())
    grids = [(t, h, w) for t, h, w in pack.grid_thw.tolist()]
    frames = packed.temporal_patch_size
    pixels = [
        unpatchify(part, grid, packed.patch_size, pack.patch_order, frames)
        for part, grid in zip(parts, grids, strict=True)
    ]
    if frames > 1:  # in which a photo is several equal ones
        pixels = [image[0] if t == 1 else image for image, (t, *_) in zip(pixels, grids, strict=True)]
    return f"{counted(len(photos), 'photo')} in one pack", pixels


def photos_in(images: str | Path | Sequence[Any]) -> Sequence[Any]:
    """The photos below a folder, those that `nopad embed` takes and in its order; photos are returned as they are.

    Raises:
        ValueError: none, or a folder below it that cannot be listed.
    """
    if not isinstance(images, str | Path):
        if not len(images):
            raise ValueError("images: expected at least one, got an empty list; give photos, or a folder of them")
        return images
    entries = list(walk(os.fspath(images), Hidden(included=False)))
    if broken := next((each for each in entries if each.reason), None):
        raise ValueError(f"images: {Path(images, broken.path)}: {broken.reason}")
    photos = [Path(images, each.path) for each in entries if suffix_of(each.path) in image_suffixes()]
    if not photos:
        raise ValueError(f"images: expected photos (.jpg, .png, .webp, .heic, …) in {str(images)!r}, got none")
    return photos


def check_image_size(image_size: int, patch_size: int, only_grid: tuple[int, int] | None, merge_size: int = 1) -> None:
    """Check a size in pixels.

    Raises:
        ValueError: no multiple of the patch size times `merge_size`, or not the only one that the reference takes.
    """
    unit = patch_size * merge_size
    if image_size < unit or image_size % unit:
        nearest = max(1, round(image_size / unit)) * unit
        of_blocks = "" if merge_size == 1 else f" times the {merge_size} patches of a merged block"
        raise ValueError(
            f"image_size: expected a multiple of patch_size {patch_size}{of_blocks}, got {image_size}; give one, such "
            f"as {nearest}"
        )
    if only_grid is not None and {image_size // patch_size} != set(only_grid):
        height, width = (patches * patch_size for patches in only_grid)
        raise ValueError(
            f"image_size: the reference takes {height} × {width} pixels and nothing else, got {image_size}; "
            f"leave it out"
        )

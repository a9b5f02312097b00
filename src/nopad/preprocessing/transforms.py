"""From 8-bit pixels to a model's own: its resize rule, its crop, its statistics."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nopad.counts import check_count, is_count
from nopad.preprocessing.decode import ImageError, as_tensor
from nopad.preprocessing.limits import MAX_PATCHES, MAX_PIXELS, MaxPatches

Rule = Literal["native", "crop", "square", "naflex"]
Resample = Literal["bicubic", "bilinear"]
Resize = Literal["pil", "torch"]

RESCALE_FACTOR = 1 / 255
NAFLEX_MAX_PATCHES = 256
MAX_ABS_VALUE = 1e9
"""Limit on mean, std and rescale factor."""

_PILLOW_CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13
_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a model wants its pixels.

    Attributes:
        rule: `"native"` keeps the size and drops what does not fill a patch at the right and the bottom, `"crop"` is
            CLIP's short side and centre crop, `"square"` resizes both sides, `"naflex"` is SigLIP2's.
        size: pixels: side of the crop for `"crop"`, side for `"square"`; `None` for the other two.
        short_side: pixels that the short side is resized to before the crop, where they are more than `size`.
        max_patches: most patches of one frame, for `"native"` and `"naflex"`; `None` is no limit and 256.
        resample: the filter of the resize, always antialiased.
        mean, std: the statistics of each colour, on the scale that `rescale_factor` makes.
        rescale_factor: what a grey level 0..255 is multiplied with.
        rescale_before_resize: the original resizes in float after rescaling, as DINOv3's does, instead of in 8 bit.

    Raises:
        ValueError: an attribute out of its range, or a size where the rule has none or none where it needs one.
    """

    rule: Rule
    size: int | None = None
    short_side: int | None = None
    max_patches: int | None = None
    resample: Resample
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float = RESCALE_FACTOR
    rescale_before_resize: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule: expected one of {get_args(Rule)}, got {self.rule!r}")
        if self.resample not in get_args(Resample):
            raise ValueError(f"resample: expected one of {get_args(Resample)}, got {self.resample!r}")
        sized = self.rule in ("crop", "square")
        if (self.size is not None) != sized or (sized and not is_count(self.size)):
            raise ValueError(f"size: expected {'pixels ≥ 1' if sized else None} for {self.rule!r}, got {self.size!r}")
        if self.short_side is not None and (
            self.rule != "crop" or not is_count(self.short_side) or self.short_side < (self.size or 0)
        ):
            expected = f"pixels ≥ {self.size}" if self.rule == "crop" else None
            raise ValueError(f"short_side: expected {expected} for {self.rule!r}, got {self.short_side!r}")
        if self.max_patches is not None and (sized or not is_count(self.max_patches)):
            expected = None if sized else "≥ 1"
            raise ValueError(f"max_patches: expected {expected} for {self.rule!r}, got {self.max_patches!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise ValueError(f"mean, std: expected 3 numbers each and no std of 0, got {self.mean} and {self.std}")
        for number in (*self.mean, *self.std, self.rescale_factor):
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MAX_ABS_VALUE:
                raise ValueError(
                    f"mean, std, rescale_factor: expected finite numbers, got {self.mean}, {self.std} and "
                    f"{self.rescale_factor!r}"
                )

    def describe(self, resize: Resize = "torch", max_patches: int | None = None) -> str:
        """One line for a table of features: what `preprocess` does with the same `resize` and `max_patches`."""
        _check_resize(resize)
        limit = self.limit(max_patches)
        with_size = f"{self.rule} {self.size}" if self.size else self.rule
        with_size += f" of short side {self.short_side}" if self.short_side else ""
        before = self._in_float(resize)
        how = "torch float" if before else {"torch": "torch uint8", "pil": "pil"}[resize]
        factor = "1/255" if self.rescale_factor == RESCALE_FACTOR else f"{self.rescale_factor:g}"
        return "; ".join(
            (
                with_size + (f" at most {limit} patches" if limit else ""),
                f"{self.resample} antialiased ({how})",
                f"rescale {factor} {'before' if before else 'after'} resize",
                f"mean {', '.join(f'{value:g}' for value in self.mean)}",
                f"std {', '.join(f'{value:g}' for value in self.std)}",
                "EXIF upright, RGB, alpha on white",
            )
        )

    def cap(self, max_patches: MaxPatches) -> int | None:
        """A limit for bulk work: `"auto"` is `MAX_PATCHES` where this rule has no limit of its own, else no other."""
        if max_patches != "auto":
            return max_patches
        return MAX_PATCHES if self.rule == "native" and self.max_patches is None else None

    def grid(self, height: int, width: int, patch_size: int, max_patches: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches that `preprocess` makes of an image of so many pixels."""
        if self.rule == "crop" and self.size is not None:
            height = width = self.size
        else:
            height, width = self._resized(height, width, patch_size, self.limit(max_patches))
        return height // patch_size, width // patch_size

    def _in_float(self, resize: Resize) -> bool:
        """Whether the resize is the original's float one, tens of times slower on large photos than that in 8 bit."""
        return self.rescale_before_resize and resize == "pil"

    def limit(self, max_patches: int | None = None) -> int | None:
        """Most patches of a frame where the rule has such a limit, or `max_patches` in its place.

        Raises:
            ValueError: `max_patches` below 1, or with a rule that cannot follow it.
        """
        if max_patches is not None:
            check_count("max_patches", max_patches)
            if self.size is not None:
                raise ValueError(
                    f"max_patches: got {max_patches}, but by the rule {self.rule!r} every image becomes a square of "
                    f"{self.size} pixels; leave it out, or give the preprocessing of another rule"
                )
        default = NAFLEX_MAX_PATCHES if self.rule == "naflex" else None
        return next((limit for limit in (max_patches, self.max_patches, default) if limit is not None), None)

    def _resized(self, height: int, width: int, patch_size: int, limit: int | None) -> tuple[int, int]:
        """Height and width after the resize and before any crop."""
        if self.size is not None:
            side = self.short_side or self.size
            return (side, side) if self.rule == "square" else _with_short_side(height, width, side)
        if self.rule == "naflex":
            # Only this module of SigLIP2's processing needs no torchvision; imported late, because it is slow.
            from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

            assert limit is not None
            return get_image_size_for_max_num_patches(height, width, patch_size, limit)
        if min(height, width) < patch_size:
            height, width = _with_short_side(height, width, patch_size)
        return (height, width) if limit is None else _within(height, width, patch_size, limit)


def preprocess(
    image: Tensor,
    preprocessing: Preprocessing,
    patch_size: int,
    *,
    resize: Resize = "torch",
    max_patches: int | None = None,
) -> Tensor:
    """Resize, crop and normalise an image, or each frame of a clip, by a model's own rule.

    `resize="pil"` gives bit for bit what the processors of transformers 5.23 give: those with Pillow, and with
    `rescale_before_resize`, which has none, the float resize of the original's torchvision. `"torch"` resizes 8-bit
    pixels several times as fast, nearly all values equal, the others within 2 grey levels. A `"native"` image smaller
    than a patch is enlarged until its short side is one patch, so that nothing is lost. A limit on patches scales a
    `"native"` image down in its aspect ratio; one row or column of patches is squeezed.

    Args:
        image: uint8 `(3, H, W)` or `(frames, 3, H, W)`.
        preprocessing: the model's rule and statistics.
        patch_size: side of a patch in pixels.
        resize: `"pil"` for the original's bits, `"torch"` for speed.
        max_patches: most patches of a frame, in place of `preprocessing.max_patches`.

    Returns:
        float32 `(3, rows * patch_size, columns * patch_size)`, with `frames` in front for a clip.

    Raises:
        ImageError: an aspect ratio so extreme that the resize would make more than `MAX_PIXELS`.
        ValueError: an argument of another shape or dtype, a fixed size that is smaller than a patch, or `max_patches`
            where the rule has a fixed size.
    """
    if image.dtype != torch.uint8 or image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected uint8 (3, H, W) or (frames, 3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    _check_resize(resize)
    size = preprocessing.size
    if size is not None and (size < patch_size or max_patches is not None):
        expected = "at least 1" if size < patch_size else f"no max_patches, got {max_patches}"
        number = (size // patch_size) ** 2
        raise ValueError(f"size {size} with patch_size {patch_size} gives {number} patches, expected {expected}")
    limit = preprocessing.limit(max_patches)
    clip = image if image.ndim == 4 else image.unsqueeze(0)
    height, width = preprocessing._resized(clip.shape[2], clip.shape[3], patch_size, limit)
    if height * width > MAX_PIXELS:
        reason = f"rule {preprocessing.rule!r} resizes it to {height}×{width}, expected at most {MAX_PIXELS} pixels"
        raise ImageError(f"image of {clip.shape[2]}×{clip.shape[3]} (height×width)", reason)
    if preprocessing._in_float(resize):
        # In float32 and in this layout: the bits of the original's torchvision processor.
        pixels = clip.contiguous().float() * preprocessing.rescale_factor
        pixels = _interpolate(pixels, height, width, preprocessing.resample)
    else:
        pixels = (_resize_pil if resize == "pil" else _resize_torch)(clip, height, width, preprocessing.resample)
    if preprocessing.rule == "crop" and size is not None:
        top, left = (height - size) // 2, (width - size) // 2
        pixels = pixels[:, :, top : top + size, left : left + size]
    rows, columns = pixels.shape[2] // patch_size, pixels.shape[3] // patch_size
    pixels = pixels[:, :, : rows * patch_size, : columns * patch_size].contiguous()
    if pixels.dtype == torch.uint8:
        pixels = _rescale(pixels, preprocessing.rescale_factor)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = pixels.sub_(mean).div_(std)
    return pixels if image.ndim == 4 else pixels[0]


def _check_resize(resize: str) -> None:
    if resize not in get_args(Resize):
        raise ValueError(f"resize: expected one of {get_args(Resize)}, got {resize!r}")


def _with_short_side(height: int, width: int, short: int) -> tuple[int, int]:
    """Transformers' `get_resize_output_image_size`: the long side is cut off to whole pixels."""
    long = int(short * max(height, width) / min(height, width))
    return (long, short) if width <= height else (short, long)


def _within(height: int, width: int, patch_size: int, limit: int) -> tuple[int, int]:
    """The size, scaled down until it holds at most `limit` whole patches, but at least one row and one column."""
    if (height // patch_size) * (width // patch_size) <= limit:
        return height, width
    scale = math.sqrt(limit * patch_size**2 / (height * width))
    # 1e-6 keeps a side that is a whole number of pixels from falling one short by rounding.
    height, width = (min(max(int(side * scale + 1e-6), patch_size), limit * patch_size) for side in (height, width))
    return height, width


def _resize_pil(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    frames = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip)
    return torch.stack([as_tensor(frame.resize((width, height), _PIL_FILTERS[resample])) for frame in frames])


def _resize_torch(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    """Pillow's resize in 8 bits, with the passes in its order: each rounds and clips, so another order differs.

    torch makes the horizontal pass first, as Pillow does before version 13. Later it begins with the vertical one where
    that takes away more than twice as many rows as the other columns.
    """
    rows, columns = clip.shape[2:]
    if _PILLOW_CHOOSES_ORDER and rows > height and rows - height > 2 * (columns - width):
        clip = _interpolate(clip, height, columns, resample)
    return _interpolate(clip, height, width, resample)


def _interpolate(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    if clip.shape[2:] == (height, width):
        return clip
    return functional.interpolate(clip, (height, width), mode=resample, align_corners=False, antialias=True)


def _rescale(pixels: Tensor, factor: float) -> Tensor:
    """Transformers' `rescale`: the product in float64, rounded to float32."""
    if factor == RESCALE_FACTOR:
        return pixels.float().div_(255)  # the same bits for all 256 grey levels, and twice as fast
    return (pixels.double() * factor).float()

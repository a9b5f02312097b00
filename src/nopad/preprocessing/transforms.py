"""Resize, crop and normalise 8-bit pixels by a model's own rule."""

from __future__ import annotations

import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nopad.preprocessing.decode import ImageError, as_tensor
from nopad.preprocessing.geometry import Placement
from nopad.preprocessing.limits import MAX_PIXELS
from nopad.preprocessing.rules import RESCALE_FACTOR, Preprocessing, Resample, Resize, check_resize

_PILLOW_CHOOSES_ORDER = int(PIL.__version__.split(".")[0]) >= 13
_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def preprocess(image: Tensor, preprocessing: Preprocessing, patch_size: int, *, resize: Resize = "torch") -> Tensor:
    """Resize, crop and normalise an image, or each frame of a clip, by a model's own rule.

    `resize="pil"` gives bit for bit what the processors of transformers 5.23 give: those with Pillow, and with
    `rescale_before_resize`, which has none, the float resize of the original's torchvision. `"torch"` resizes 8-bit
    pixels several times as fast, nearly all values equal, the others within 2 grey levels. A limit on patches scales a
    `"native"` image down in its aspect ratio; one row or column of patches is squeezed.

    Args:
        image: uint8 `(3, H, W)` or `(frames, 3, H, W)`.
        preprocessing: the model's rule and statistics.
        patch_size: side of a patch in pixels.
        resize: `"pil"` for the original's bits, `"torch"` for speed.

    Returns:
        float32 `(3, rows * patch_size, columns * patch_size)`, with `frames` in front for a clip.

    Raises:
        ImageError: an aspect ratio so extreme that the resize would make more than `MAX_PIXELS`, or that the rule
            refuses; a `"native"` image smaller than a patch, without `min_patches`.
        ValueError: an argument of another shape or dtype, or a size that is smaller than a patch.
    """
    return normalize(resize_image(image, preprocessing, patch_size, resize=resize), preprocessing)


def resize_image(
    image: Tensor,
    preprocessing: Preprocessing,
    patch_size: int,
    *,
    resize: Resize = "torch",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The first half of `preprocess`, with its arguments and errors: resize and crop.

    Args:
        size: height and width of the image where `image` was scaled down already.

    Returns:
        `(3, rows * patch_size, columns * patch_size)`, with `frames` in front for a clip: uint8, or rescaled float32
        where `preprocessing.is_resized_in_float(resize)`.
    """
    if image.dtype != torch.uint8 or image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected uint8 (3, H, W) or (frames, 3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    check_resize(resize)
    clip = image if image.ndim == 4 else _as_clip(image)
    height, width = size or clip.shape[2:]
    place = place_image(height, width, preprocessing, patch_size)
    if preprocessing.is_resized_in_float(resize):
        # In float32 and in this layout: the bits of the original's torchvision processor.
        pixels = clip.contiguous().float() * preprocessing.rescale_factor
        pixels = _interpolate(pixels, place.height, place.width, preprocessing.resample)
    else:
        resized = _resize_pil if resize == "pil" else _resize_torch
        pixels = resized(clip, place.height, place.width, preprocessing.resample)
    bottom, right = place.top + place.rows * patch_size, place.left + place.columns * patch_size
    pixels = pixels[:, :, place.top : bottom, place.left : right]
    if pixels.shape[2:] != (place.rows * patch_size, place.columns * patch_size):  # black, where the rule adds pixels
        pixels = functional.pad(pixels, (0, right - pixels.shape[3], 0, bottom - pixels.shape[2]))
    return pixels if image.ndim == 4 else pixels[0]


def place_image(height: int, width: int, preprocessing: Preprocessing, patch_size: int) -> Placement:
    """Size and patches of an image after `resize_image`.

    Raises:
        ImageError: too many pixels then, or an aspect ratio or size that the rule refuses.
    """
    place = preprocessing.place(height, width, patch_size)
    if place.height * place.width > MAX_PIXELS:
        reason = (
            f"{height}×{width} pixels (height×width): rule {preprocessing.rule!r} resizes it to "
            f"{place.height}×{place.width}, expected at most {MAX_PIXELS} pixels"
        )
        raise ImageError("image", reason)
    return place


def normalize(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The second half of `preprocess`: rescale grey levels and apply the statistics.

    Args:
        pixels: `(…, 3, H, W)` as `resize_image` returns them.
        preprocessing: the model's rule and statistics.

    Returns:
        float32 of the same shape.
    """
    pixels = pixels.contiguous()
    if pixels.dtype == torch.uint8:
        pixels = _rescale(pixels, preprocessing.rescale_factor)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    return pixels.sub(mean).div_(std)


def level_values(preprocessing: Preprocessing) -> Tensor:
    """The value of each grey level by `normalize`: float32 `(3, 256)`, a row for each colour."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalize(levels, preprocessing)[:, 0]


def _as_clip(image: Tensor) -> Tensor:
    """One frame, `(1, 3, H, W)`: channels last where the image is, also to torch, which looks at the first stride."""
    return image.permute(1, 2, 0).unsqueeze(0).permute(0, 3, 1, 2) if image.stride(0) == 1 else image.unsqueeze(0)


def _resize_pil(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    frames = (Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip)
    return torch.stack([as_tensor(frame.resize((width, height), _PIL_FILTERS[resample])) for frame in frames])


def _resize_torch(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    """Pillow's resize in 8 bits, with the passes in its order; torch makes the horizontal pass first."""
    rows, columns = clip.shape[2:]
    if is_vertical_first(rows, columns, height, width):
        clip = _interpolate(clip, height, columns, resample)
    return _interpolate(clip, height, width, resample)


def is_vertical_first(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether Pillow resizes in the order that is not the usual one: each pass rounds and clips, so the order counts.

    Before version 13 it makes the horizontal pass first. Later it begins with the vertical one where that takes away
    more than twice as many rows as the other columns.
    """
    return _PILLOW_CHOOSES_ORDER and rows > height and rows - height > 2 * (columns - width)


def _interpolate(clip: Tensor, height: int, width: int, resample: Resample) -> Tensor:
    if clip.shape[2:] == (height, width):
        return clip
    return functional.interpolate(clip, (height, width), mode=resample, align_corners=False, antialias=True)


def _rescale(pixels: Tensor, factor: float) -> Tensor:
    """Transformers' `rescale`: the product in float64, rounded to float32."""
    if factor == RESCALE_FACTOR:
        return pixels.float().div_(255)  # the same bits for all 256 grey levels, and twice as fast
    return (pixels.double() * factor).float()

"""JPEGs at a fraction of their size: to check those that a GPU's decoder may have, or instead of a larger resize."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from nopad.preprocessing.decode import BOMB, DAMAGE, UPRIGHT, as_tensor, load_image, orientation
from nopad.preprocessing.file_structure import MAX_SCANS, START_OF_SCAN, frame_marker
from nopad.preprocessing.formats import open_image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_DEVICE_PIXELS = 1 << 26
"""Larger JPEGs are decoded on the CPU, so that the memory of the GPU is bounded."""

_BASELINE = 0xC0
_SAMPLINGS = ("420", "422", "444")
_MIN_FACTOR = 2  # libjpeg-turbo also has eighths between a half and the whole, but they are slow


@dataclass(frozen=True, slots=True)
class CheckedJpeg:
    """The header of a JPEG that a GPU may decode; `check_jpeg` has decoded its data to the end without a complaint.

    Attributes:
        width, height: pixels as they are stored.
        orientation: EXIF orientation, 1 … 8.
        small: pixels `(h, w, 3)` at a fraction of the size, as they are stored; `None` where none were requested.
    """

    width: int
    height: int
    orientation: int
    small: np.ndarray | None


def load_decoders() -> None:
    """Load Pillow's plugins and libjpeg-turbo, a tenth of a second, by decoding a small JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    load_image(file.getvalue())
    check_jpeg(file.getvalue(), max_pixels=MAX_DEVICE_PIXELS)


def check_jpeg(data: bytes, *, max_pixels: int, min_side: int | None = None) -> CheckedJpeg | None:
    """Check that a file is a JPEG that a GPU decodes as libjpeg-turbo does; `None` where the CPU has to decide.

    The GPU's engines fill up what is cut short and say nothing, so the whole file is decoded here, strictly, at the
    smallest scale of libjpeg-turbo and without its colours: all of its entropy-coded data are read, those of colours
    too, and few pixels are computed.

    Args:
        max_pixels: larger images are left to `load_image`, which words the error.
        min_side: pixels that the longer side of `small` has at least, where the image has as many; `None` for no
            `small`, which takes two thirds of the time.
    """
    if simplejpeg is None or data.count(START_OF_SCAN) > 1:  # scans of single colours, or a second image
        return None
    header = jpeg_header(data, max_pixels=max_pixels)
    if header is None:
        return None
    width, height = header.width, header.height
    scale = min(min_side or 1, max(width, height)) / max(width, height)
    min_sides = {"min_width": max(1, int(width * scale)), "min_height": max(1, int(height * scale))}
    try:
        pixels = simplejpeg.decode_jpeg(data, "GRAY" if min_side is None else "RGB", strict=True, **min_sides)
    except DAMAGE:
        return None
    return header if min_side is None else replace(header, small=pixels)


def jpeg_header(data: bytes, *, max_pixels: int) -> CheckedJpeg | None:
    """The header of a baseline JPEG in YCbCr that a GPU may decode; its data are not looked at."""
    if simplejpeg is None or frame_marker(data) != _BASELINE:
        return None
    try:
        header = _header(data, min(max_pixels, MAX_DEVICE_PIXELS))
        if header is None or header.is_progressive:
            return None
        *_, colours, sampling = simplejpeg.decode_jpeg_header(data)
    except (*DAMAGE, *BOMB):
        return None
    if colours != "YCbCr" or sampling not in _SAMPLINGS:
        return None
    return CheckedJpeg(header.width, header.height, header.orientation, None)


def scaled_jpeg(
    data: bytes, min_size: Callable[[int, int], tuple[int, int]], *, max_pixels: int
) -> tuple[Tensor, tuple[int, int]] | None:
    """Decode a colour JPEG at a half, a quarter or an eighth of its size where that is large enough, otherwise whole.

    Args:
        min_size: returns the minimum height and width of the pixels, for those of the upright image.
        max_pixels: larger images are left to `load_image`, which words the error.

    Returns:
        Upright uint8 `(3, h, w)`, and the image's own height and width; `None` for what `load_image` has to decide.
    """
    if simplejpeg is None or data.count(START_OF_SCAN) > MAX_SCANS:
        return None
    try:
        header = _header(data, max_pixels)
        if header is None:
            return None
        size = upright_size(header.width, header.height, header.orientation)
        width, height = upright_size(*min_size(*size), header.orientation)  # as it is stored
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", strict=True, min_width=width, min_height=height, min_factor=_MIN_FACTOR
        )
    except (*DAMAGE, *BOMB):
        return None
    return upright(pixels, header.orientation), size


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    height: int
    orientation: int
    is_progressive: bool


def _header(data: bytes, max_pixels: int) -> _Header | None:
    """The header of a colour JPEG of at most so many pixels; may raise `DAMAGE` and `BOMB`."""
    with open_image(data) as image:
        width, height = image.size
        if image.format not in ("JPEG", "MPO") or image.mode != "RGB" or not 0 < width * height <= max_pixels:
            return None
        return _Header(width, height, orientation(image), "progressive" in image.info)


def upright(small: np.ndarray, orientation: int) -> Any:
    """Pixels `(h, w, 3)` as a tensor `(3, H, W)`, turned by an EXIF orientation."""
    from PIL import Image

    turn = UPRIGHT.get(orientation)
    return as_tensor(small if turn is None else Image.fromarray(small).transpose(turn))


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Height and width of an image after it is turned by an EXIF orientation."""
    return (width, height) if orientation >= 5 else (height, width)


def upright_strides(width: int, height: int, row_stride: int, orientation: int) -> tuple[int, int, int]:
    """How to read stored pixels `(height, width, 3)` upright, without turning them.

    Returns:
        Bytes from the first stored pixel to the first upright one, from a row to the next, from a column to the next.
    """
    last_row, last_column = (height - 1) * row_stride, (width - 1) * 3
    return {
        2: (last_column, row_stride, -3),
        3: (last_row + last_column, -row_stride, -3),
        4: (last_row, -row_stride, 3),
        5: (0, 3, row_stride),
        6: (last_row, 3, -row_stride),
        7: (last_row + last_column, -3, -row_stride),
        8: (last_column, -3, row_stride),
    }.get(orientation, (0, row_stride, 3))

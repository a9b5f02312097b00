"""The size of an image before it is decoded."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from nopad.preprocessing.decode import DAMAGE, orientation
from nopad.preprocessing.files import open_regular
from nopad.preprocessing.formats import VIDEO_SUFFIXES, readable_formats
from nopad.preprocessing.load import load

_BY_HEADER = frozenset(("BMP", "JPEG", "MPO", "PNG", "WEBP"))
"""Formats whose header has the size of what is decoded. A TIFF may be turned, and an ICO holds another picture."""
_TRANSPOSED = 5
"""The first EXIF orientation that swaps rows and columns, as all above it do."""


def measure(source: Any) -> tuple[int, int, int]:
    """Frames, height and width of what `load` returns: by the header where it has them, else by decoding.

    Raises:
        ImageError: see `load`; damage behind the header is not seen.
    """
    if isinstance(source, list | tuple) and source:
        frames, height, width = measure(source[0])
        return frames * len(source), height, width
    if isinstance(source, np.ndarray) and source.ndim in (2, 3, 4):
        return _shape((*source.shape, 3) if source.ndim == 2 else source.shape, channels=-1)
    if isinstance(source, Tensor) and source.ndim in (3, 4):
        return _shape(tuple(source.shape), channels=-3)
    by_header = _by_header(source)
    return _shape(tuple(load(source).shape), channels=-3) if by_header is None else (1, *by_header)


def _shape(shape: tuple[int, ...], *, channels: int) -> tuple[int, int, int]:
    frames = shape[0] if len(shape) == 4 else 1
    height, width = shape[-3:-1] if channels == -1 else shape[-2:]
    return frames, height, width


def _by_header(source: Any) -> tuple[int, int] | None:
    """Height and width of a file or an image that Pillow has opened; `None` where the header does not have them."""
    if isinstance(source, Image.Image):
        return _upright(source) if source.format in (None, *_BY_HEADER) else None
    is_file = isinstance(source, str | Path) and Path(source).suffix.lower() not in VIDEO_SUFFIXES
    if not is_file and not isinstance(source, bytes):
        return None
    try:
        formats = [format for format in readable_formats() if format in _BY_HEADER]
        raw = io.BytesIO(source) if isinstance(source, bytes) else io.BufferedReader(open_regular(os.fsencode(source)))
        with raw as file, Image.open(file, formats=formats) as image:
            return _upright(image)
    except (*DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None  # `load` raises with the reason


def _upright(image: Image.Image) -> tuple[int, int]:
    return (image.width, image.height) if orientation(image) >= _TRANSPOSED else (image.height, image.width)

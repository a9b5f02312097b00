"""Small JPEGs of images."""

from __future__ import annotations

import io

from PIL import Image
from torch import Tensor

QUALITY = 80
MAX_BYTES = 512 << 10
"""Bytes of a thumbnail in a table; one of noise and the largest side has less."""


def thumbnail(pixels: Tensor, side: int) -> bytes:
    """An image as a JPEG of at most `side` pixels a side; of a clip the frame in its middle.

    Args:
        pixels: upright, uint8 `(3, H, W)` or `(frames, 3, H, W)`.
        side: maximum pixels of a side, at least 1; smaller images stay as they are.
    """
    frame = pixels if pixels.ndim == 3 else pixels[len(pixels) // 2]
    image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def is_thumbnail(data: object) -> bool:
    """Whether bytes of a file that is not trusted begin as a JPEG and are no more than `thumbnail` makes."""
    return isinstance(data, bytes) and data[:3] == b"\xff\xd8\xff" and len(data) <= MAX_BYTES

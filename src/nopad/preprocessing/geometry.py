"""Sizes of an image after a resize, and the position of the grid of patches in it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placement:
    """Position of the grid of patches in a resized image.

    Attributes:
        height, width: pixels after the resize.
        top, left: pixels before the first row and the first column of patches.
        rows, columns: rows and columns of patches; the rule that adds pixels makes them more than the image fills.
    """

    height: int
    width: int
    top: int
    left: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        """Patches of the grid."""
        return self.rows * self.columns

    def box(self, height: int, width: int, patch_size: int) -> tuple[float, float, float, float]:
        """The rectangle that the grid covers, `(x0, y0, x1, y1)` in pixels of an image of this `height` and `width`."""
        x, y = width / self.width, height / self.height
        right, bottom = self.left + self.columns * patch_size, self.top + self.rows * patch_size
        return self.left * x, self.top * y, right * x, bottom * y


def with_short_side(height: int, width: int, short: int) -> tuple[int, int]:
    """Transformers' `get_resize_output_image_size`, and torchvision's `Resize`: the long side is cut off to pixels."""
    long = int(short * max(height, width) / min(height, width))
    return (long, short) if width <= height else (short, long)


def with_long_side(height: int, width: int, longest: int, unit: int) -> tuple[int, int]:
    """Transformers' size for Pixtral: scaled down to at most `longest`, then both sides up to multiples of `unit`.

    A side that the original scales to nothing has one pixel before it is rounded up.
    """
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = (max(math.floor(side / ratio), 1) for side in (height, width))
    return height + -height % unit, width + -width % unit


def within_patches(height: int, width: int, patch_size: int, limit: int, limit_of_side: int) -> tuple[int, int]:
    """Transformers' size for Kimi: scaled down to about `limit` patches, and at most `limit_of_side` along a side."""
    number = max(height // patch_size, 1) * max(width // patch_size, 1)
    longest = limit_of_side * patch_size
    scale = min(1.0, math.sqrt(limit / number), longest / height, longest / width)
    height, width = (min(max(int(side * scale), 1), longest) for side in (height, width))
    return height, width


def at_most(height: int, width: int, unit: int, limit: int) -> tuple[int, int]:
    """The size, scaled down until it holds at most `limit` whole squares of `unit` pixels, but at least one."""
    if (height // unit) * (width // unit) <= limit:
        return height, width
    scale = math.sqrt(limit * unit**2 / (height * width))
    # 1e-6 keeps a side that is a whole number of pixels from falling one short by rounding.
    height, width = (min(max(int(side * scale + 1e-6), unit), limit * unit) for side in (height, width))
    return height, width


def at_least(height: int, width: int, unit: int, minimum: int) -> tuple[int, int]:
    """The size, scaled up until it holds at least `minimum` whole squares of `unit` pixels, as little as that takes."""
    rows, columns = height // unit, width // unit
    if rows * columns >= minimum:
        return height, width
    scale = math.sqrt(minimum * unit**2 / (height * width))
    while True:
        rows, columns = (int(side * scale / unit + 1e-9) for side in (height, width))
        if rows * columns >= minimum:
            return max(int(height * scale + 1e-6), rows * unit), max(int(width * scale + 1e-6), columns * unit)
        scale = min((rows + 1) * unit / height, (columns + 1) * unit / width)

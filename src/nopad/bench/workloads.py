"""What a benchmark runs on: images as grids of patches, the same on every machine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

FEWEST, MOST = 128, 1024
"""Patches of an image of the mixed workload."""
NARROWEST = 3.0
"""The longer side of an image of the mixed workload over the shorter, at most, before both are rounded."""


@dataclass(frozen=True)
class Workload:
    """Images by their sizes.

    Attributes:
        name: for tables.
        grids: `(rows, columns)` of each image, in patches.
    """

    name: str
    grids: tuple[tuple[int, int], ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    @property
    def tokens(self) -> int:
        """Patches of all images together."""
        return sum(self.lengths)


def mixed(images: int, seed: int) -> Workload:
    """Photos at native resolution: 256 images have about 220 sizes, 148,000 patches, and a mean of 577.

    Patches are uniform in `FEWEST` … `MOST`, which no image passes; the aspect ratio is log-uniform in
    `1 / NARROWEST` … `NARROWEST`.
    """
    draw = random.Random(seed)
    grids = []
    for _ in range(images):
        patches = draw.uniform(FEWEST, MOST)
        aspect = math.exp(draw.uniform(-math.log(NARROWEST), math.log(NARROWEST)))
        rows = round(math.sqrt(patches / aspect))
        grids.append((rows, int(patches / rows)))
    return Workload("mixed", tuple(grids))


def fixed(images: int, side: int, patch_size: int) -> Workload:
    """Squares of `side` pixels, rounded down to whole patches.

    Raises:
        ValueError: not a patch fits.
    """
    patches = side // patch_size
    if patches < 1:
        raise ValueError(f"side: expected at least patch_size {patch_size} pixels, got {side}")
    return Workload(f"{patches * patch_size}px", ((patches, patches),) * images)

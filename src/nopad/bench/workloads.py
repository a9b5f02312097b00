"""Workloads of a benchmark: images as grids of patches, the same on every machine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property

from nopad.counts import counted

MIN_PATCHES, MAX_PATCHES = 128, 1024
"""Patches of an image of the mixed workload."""
MAX_ASPECT = 3.0
"""Longer side over shorter side of an image of the mixed workload, before both are rounded."""


MIN_SIDE, MAX_SIDE = 4, 10
"""Patches along a side of an image of the small workload."""


@dataclass(frozen=True)
class Workload:
    """Images by their sizes.

    Attributes:
        name: name in tables.
        grids: `(rows, columns)` of each image, in patches.
    """

    name: str
    grids: tuple[tuple[int, int], ...]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Patches of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    def in_multiples_of(self, size: int) -> Workload:
        """The same images with rows and columns rounded down to multiples of `size`, at least one."""
        return Workload(self.name, tuple((max(h - h % size, size), max(w - w % size, size)) for h, w in self.grids))

    @property
    def tokens(self) -> int:
        """Patches of all images together."""
        return sum(self.lengths)

    def describe(self) -> str:
        """Its images in one line."""
        return describe_images(len(self.grids), len(set(self.grids)), self.tokens, max(self.lengths))


def describe_images(images: int, sizes: int, tokens: int, longest: int) -> str:
    """Images, their sizes and patches in one line."""
    of_sizes = "one size" if sizes == 1 else f"{sizes:,} sizes"
    return f"{counted(images, 'image')} of {of_sizes}, {tokens:,} patches, at most {longest:,} each"


def mixed(images: int, seed: int) -> Workload:
    """Photos at native resolution: 256 images have about 220 sizes, 148,000 patches, and a mean of 577.

    Patches are uniform in `MIN_PATCHES` … `MAX_PATCHES`, and no image has more; the aspect ratio is log-uniform in
    `1 / MAX_ASPECT` … `MAX_ASPECT`.
    """
    draw = random.Random(seed)
    grids = []
    for _ in range(images):
        patches = draw.uniform(MIN_PATCHES, MAX_PATCHES)
        aspect = math.exp(draw.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        rows = round(math.sqrt(patches / aspect))
        grids.append((rows, int(patches / rows)))
    return Workload("mixed", tuple(grids))


def small(images: int, seed: int) -> Workload:
    """Thumbnails and crops: sides are uniform in `MIN_SIDE` … `MAX_SIDE` patches, 49 patches in the mean."""
    draw = random.Random(seed)

    def side() -> int:
        return draw.randint(MIN_SIDE, MAX_SIDE)

    return Workload("small", tuple((side(), side()) for _ in range(images)))


def fixed(images: int, side: int, patch_size: int) -> Workload:
    """Squares of `side` pixels, rounded down to whole patches.

    Raises:
        ValueError: not a patch fits.
    """
    patches = side // patch_size
    if patches < 1:
        raise ValueError(f"side: expected at least patch_size {patch_size} pixels, got {side}")
    return Workload(f"{patches * patch_size}px", ((patches, patches),) * images)

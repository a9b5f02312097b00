"""How products are cut into tiles on a Hopper GPU, for quack."""

from __future__ import annotations

import math
from dataclasses import dataclass

WRITTEN = 32
"""Columns that quack writes at a time unless told otherwise, where results have 16 bits."""


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows, columns: of a tile.
        speed: of such tiles, relative to others, as measured on an H100 (docs/performance.md).
        cluster: tiles above and beside each other that share what they read.
        written: columns that are written at a time. Threads wait for each other twice each time, which counts where a
            product is short, as in float8; more of them need registers.
    """

    rows: int
    columns: int
    speed: float = 1.0
    cluster: tuple[int, int] = (2, 1)
    written: int = WRITTEN


BESIDE = (1, 2)
GENERAL = (
    Tiles(128, 192),
    Tiles(128, 192, 0.96, cluster=BESIDE),
    Tiles(128, 160, 0.965),
    Tiles(128, 160, 0.95, cluster=BESIDE),
    Tiles(128, 128, 0.92, cluster=BESIDE),
)
"""For most products."""
MANY_TERMS = 1536
"""Of a product in float8 that reads the residual stream: from so many on these are best for it, too."""
MANY_COLUMNS = 1152
"""Of a product that adds to the residual stream: the same."""
FLOAT8_FEW_TERMS = (
    Tiles(128, 192, written=64),
    Tiles(128, 192, 0.995, cluster=BESIDE, written=64),
    Tiles(128, 128, 0.875, cluster=BESIDE, written=64),
    Tiles(128, 160, 0.85, cluster=BESIDE),
)
"""For a product in float8 of few terms."""
SHORT = (
    Tiles(128, 128),
    Tiles(128, 128, 0.99, cluster=BESIDE),
    Tiles(128, 160, 0.985),
    Tiles(128, 192, 0.97),
    Tiles(128, 208, 0.92),
)
"""For a residual sum of few columns and few terms, which is written as long as it is multiplied."""
DEEP = (
    Tiles(128, 128, cluster=BESIDE),
    Tiles(128, 128, 0.98),
    Tiles(128, 208),
    Tiles(128, 160, 0.98),
    Tiles(128, 192, 0.955),
)
"""For one of few columns and many terms."""
FLOAT8_DEEP = (
    Tiles(128, 128),
    Tiles(128, 128, 0.988, cluster=BESIDE),
    Tiles(128, 160, 1.03),
    Tiles(128, 192),
    Tiles(128, 208, 0.925),
)
"""For a residual sum of few columns in float8."""


def best(among: tuple[Tiles, ...], rows: int, columns: int, processors: int) -> Tiles:
    """The tiles that take least time: as many rounds of a tile for each processor as it takes, by a tile's area.

    Clusters are whole: an odd number of tiles has an idle one beside it.

    Args:
        among: of equals, the first is taken.
        rows, columns: of the product.
        processors: multiprocessors of the GPU.
    """

    def cost(tiles: Tiles) -> float:
        above, beside = tiles.cluster
        clusters = math.ceil(rows / (tiles.rows * above)) * math.ceil(columns / (tiles.columns * beside))
        rounds = math.ceil(clusters / (processors // (above * beside)))
        return rounds * tiles.rows * tiles.columns / tiles.speed

    return min(among, key=cost)


def candidates(columns: int, terms: int, *, float8: bool, adds: bool) -> tuple[Tiles, ...]:
    """Tiles that a product may have.

    Args:
        columns, terms: of the product.
        float8: whether it multiplies in float8.
        adds: whether it adds to the residual stream; else it reads it.
    """
    if adds and columns < MANY_COLUMNS:
        return FLOAT8_DEEP if float8 else DEEP if terms > columns else SHORT
    return FLOAT8_FEW_TERMS if float8 and not adds and terms < MANY_TERMS else GENERAL

"""Tile sizes of quack's GEMMs on Hopper GPUs.

M, N and K are the sizes of a GEMM: rows of activations, rows of the weight, and the inner size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEFAULT_EPI_N = 32
"""Columns of quack's own epilogue tile for 16-bit outputs."""


@dataclass(frozen=True)
class TileConfig:
    """Tiles of a GEMM.

    Attributes:
        tile_m, tile_n: tile size.
        speed: throughput of such tiles relative to others, as measured on an H100 (docs/tuning.md).
        cluster_m, cluster_n: cluster shape.
        epi_n: columns of the epilogue tile. Threads synchronise twice per epilogue tile, which matters for small K, as
            in float8; wider ones need more registers.
    """

    tile_m: int
    tile_n: int
    speed: float = 1.0
    cluster_m: int = 2
    cluster_n: int = 1
    epi_n: int = DEFAULT_EPI_N


def _cluster_1x2(tile_m: int, tile_n: int, speed: float = 1.0, epi_n: int = DEFAULT_EPI_N) -> TileConfig:
    return TileConfig(tile_m, tile_n, speed, cluster_m=1, cluster_n=2, epi_n=epi_n)


GENERAL = (
    TileConfig(128, 192),
    _cluster_1x2(128, 192, 0.96),
    TileConfig(128, 160, 0.965),
    _cluster_1x2(128, 160, 0.95),
    _cluster_1x2(128, 128, 0.92),
)
"""Tiles of most GEMMs."""
FP8_SMALL_K = (
    TileConfig(128, 192, epi_n=64),
    _cluster_1x2(128, 192, 0.995, epi_n=64),
    _cluster_1x2(128, 128, 0.875, epi_n=64),
    _cluster_1x2(128, 160, 0.85),
)
"""Tiles of a float8 GEMM of small K that reads the residual stream."""
RESIDUAL_SMALL_K = (
    TileConfig(128, 128),
    _cluster_1x2(128, 128, 0.99),
    TileConfig(128, 160, 0.985),
    TileConfig(128, 192, 0.97),
    TileConfig(128, 208, 0.92),
)
"""Tiles of a residual GEMM of small N and small K, whose epilogue takes as long as its main loop."""
RESIDUAL_LARGE_K = (
    _cluster_1x2(128, 128),
    TileConfig(128, 128, 0.98),
    TileConfig(128, 208),
    TileConfig(128, 160, 0.98),
    TileConfig(128, 192, 0.955),
)
"""Tiles of a residual GEMM of small N and large K."""
FP8_RESIDUAL = (
    TileConfig(128, 128),
    _cluster_1x2(128, 128, 0.988),
    TileConfig(128, 160, 1.03),
    TileConfig(128, 192),
    TileConfig(128, 208, 0.925),
)
"""Tiles of a float8 residual GEMM of small N."""
LARGE_K = 1536
"""K from which `GENERAL` is fastest for a float8 GEMM that reads the residual stream."""
LARGE_N = 1152
"""N from which `GENERAL` is fastest for a residual GEMM."""


def tile_configs(n: int, k: int, *, float8: bool, residual: bool) -> tuple[TileConfig, ...]:
    """Candidate tiles of a GEMM.

    Args:
        n, k: sizes of the GEMM.
        float8: whether its operands are float8.
        residual: whether it adds to the residual stream; else it reads the residual stream.
    """
    if residual and n < LARGE_N:
        return FP8_RESIDUAL if float8 else RESIDUAL_LARGE_K if k > n else RESIDUAL_SMALL_K
    return FP8_SMALL_K if float8 and not residual and k < LARGE_K else GENERAL


def fastest(configs: tuple[TileConfig, ...], m: int, n: int, num_sms: int) -> TileConfig:
    """The tiles with the least time, estimated as waves of clusters times the time of a tile.

    A wave is one tile on each multiprocessor. Only whole clusters run, so an odd number of tiles leaves one idle.

    Args:
        configs: candidates; the first of equals is returned.
        m, n: sizes of the GEMM.
        num_sms: multiprocessors of the GPU.
    """

    def cost(config: TileConfig) -> float:
        clusters_m = math.ceil(m / (config.tile_m * config.cluster_m))
        clusters_n = math.ceil(n / (config.tile_n * config.cluster_n))
        waves = math.ceil(clusters_m * clusters_n / (num_sms // (config.cluster_m * config.cluster_n)))
        return waves * config.tile_m * config.tile_n / config.speed

    return min(configs, key=cost)

"""Which tiles are selected, and that an idle half of a cluster counts."""

import pytest

from nopad.inference.fusion.tile_config import (
    FP8_RESIDUAL,
    FP8_SMALL_K,
    GENERAL,
    RESIDUAL_LARGE_K,
    RESIDUAL_SMALL_K,
    TileConfig,
    fastest,
    tile_configs,
)

NUM_SMS = 132  # of an H100


def test_fastest_counts_waves_of_whole_clusters():
    cluster_2x1, cluster_1x2 = TileConfig(128, 128), TileConfig(128, 128, 0.6, cluster_m=1, cluster_n=2)
    # 33 × 8 tiles are 17 × 8 clusters of 2 × 1, in three waves of 66, or 33 × 4 clusters of 1 × 2, in two waves.
    assert fastest((cluster_2x1, cluster_1x2), 33 * 128, 8 * 128, NUM_SMS) is cluster_2x1
    faster_1x2 = TileConfig(128, 128, 0.7, cluster_m=1, cluster_n=2)
    assert fastest((cluster_2x1, faster_1x2), 33 * 128, 8 * 128, NUM_SMS) is faster_1x2
    assert fastest((cluster_1x2, cluster_2x1), 34 * 128, 8 * 128, NUM_SMS) is cluster_2x1
    assert fastest((cluster_2x1, TileConfig(128, 128)), 256, 128, NUM_SMS) is cluster_2x1


@pytest.mark.parametrize(
    ("configs", "m", "n", "expected"),
    [
        (GENERAL, 16896, 3072, (192, (2, 1))),
        (GENERAL, 4224, 3072, (192, (1, 2))),
        (GENERAL, 16896, 5632, (192, (2, 1))),
        (GENERAL, 4224, 5632, (160, (1, 2))),
        (FP8_SMALL_K, 16896, 5632, (192, (2, 1))),
        (FP8_SMALL_K, 4224, 5632, (192, (2, 1))),
        (FP8_SMALL_K, 4224, 3072, (192, (1, 2))),
        (RESIDUAL_SMALL_K, 16896, 1024, (128, (2, 1))),
        (RESIDUAL_SMALL_K, 4224, 1024, (128, (1, 2))),
        (RESIDUAL_LARGE_K, 16896, 1024, (128, (1, 2))),
        (RESIDUAL_LARGE_K, 4224, 1024, (128, (1, 2))),
        (FP8_RESIDUAL, 16896, 1024, (128, (2, 1))),
        (FP8_RESIDUAL, 4224, 1024, (128, (1, 2))),
        (GENERAL, 16896, 16384, (192, (2, 1))),
        (GENERAL, 16896, 2048, (192, (2, 1))),
        (GENERAL, 16896, 1152, (192, (2, 1))),
        (GENERAL, 16896, 1280, (160, (2, 1))),
    ],
)
def test_fastest_is_what_was_fastest_on_an_h100(configs, m, n, expected):
    config = fastest(configs, m, n, NUM_SMS)
    assert (config.tile_n, (config.cluster_m, config.cluster_n)) == expected


@pytest.mark.parametrize(
    ("n", "k", "float8", "residual", "expected"),
    [
        (3072, 1024, False, False, GENERAL),
        (5632, 1024, True, False, FP8_SMALL_K),
        (1024, 1024, False, True, RESIDUAL_SMALL_K),
        (1024, 2816, False, True, RESIDUAL_LARGE_K),
        (1024, 2816, True, True, FP8_RESIDUAL),
        (9216, 3072, False, False, GENERAL),
        (3072, 3072, False, True, GENERAL),
        (1280, 5120, True, True, GENERAL),
        (1152, 1152, False, True, GENERAL),
        (1152, 1152, True, True, GENERAL),
        (10240, 1280, True, False, FP8_SMALL_K),
        (8192, 1536, True, False, GENERAL),
    ],
)
def test_tile_configs(n, k, float8, residual, expected):
    assert tile_configs(n, k, float8=float8, residual=residual) is expected


def test_wide_float8_gemms_have_wide_epilogue_tiles():
    assert {(config.tile_n, config.epi_n) for config in FP8_SMALL_K} == {(192, 64), (160, 32), (128, 64)}
    others = (*GENERAL, *RESIDUAL_SMALL_K, *RESIDUAL_LARGE_K, *FP8_RESIDUAL)
    assert {config.epi_n for config in others} == {32}

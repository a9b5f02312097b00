"""Which tiles are taken, and that an idle half of a cluster counts."""

import pytest

from nopad.inference.fusion.tile_config import (
    DEEP,
    FLOAT8_DEEP,
    FLOAT8_FEW_TERMS,
    GENERAL,
    SHORT,
    Tiles,
    best,
    candidates,
)

PROCESSORS = 132  # of an H100


def test_rounds_of_whole_clusters_are_counted():
    above, beside = Tiles(128, 128), Tiles(128, 128, 0.6, cluster=(1, 2))
    # 33 rows of 8 tiles: 17 by 8 clusters, of which 66 run at a time, take three rounds, 33 by 4 take two.
    assert best((above, beside), 33 * 128, 8 * 128, PROCESSORS) is above
    assert best((above, Tiles(128, 128, 0.7, cluster=(1, 2))), 33 * 128, 8 * 128, PROCESSORS).cluster == (1, 2)
    assert best((beside, above), 34 * 128, 8 * 128, PROCESSORS) is above
    assert best((above, Tiles(128, 128)), 256, 128, PROCESSORS) is above


@pytest.mark.parametrize(
    ("among", "rows", "columns", "expected"),
    [
        (GENERAL, 16896, 3072, (192, (2, 1))),
        (GENERAL, 4224, 3072, (192, (1, 2))),
        (GENERAL, 16896, 5632, (192, (2, 1))),
        (GENERAL, 4224, 5632, (160, (1, 2))),
        (FLOAT8_FEW_TERMS, 16896, 5632, (192, (2, 1))),
        (FLOAT8_FEW_TERMS, 4224, 5632, (192, (2, 1))),
        (FLOAT8_FEW_TERMS, 4224, 3072, (192, (1, 2))),
        (SHORT, 16896, 1024, (128, (2, 1))),
        (SHORT, 4224, 1024, (128, (1, 2))),
        (DEEP, 16896, 1024, (128, (1, 2))),
        (DEEP, 4224, 1024, (128, (1, 2))),
        (FLOAT8_DEEP, 16896, 1024, (128, (2, 1))),
        (FLOAT8_DEEP, 4224, 1024, (128, (1, 2))),
        (GENERAL, 16896, 16384, (192, (2, 1))),
        (GENERAL, 16896, 2048, (192, (2, 1))),
        (GENERAL, 16896, 1152, (192, (2, 1))),
        (GENERAL, 16896, 1280, (160, (2, 1))),
    ],
)
def test_what_was_fastest_on_an_h100_is_taken(among, rows, columns, expected):
    tiles = best(among, rows, columns, PROCESSORS)
    assert (tiles.columns, tiles.cluster) == expected


@pytest.mark.parametrize(
    ("columns", "terms", "float8", "adds", "expected"),
    [
        (3072, 1024, False, False, GENERAL),
        (5632, 1024, True, False, FLOAT8_FEW_TERMS),
        (1024, 1024, False, True, SHORT),
        (1024, 2816, False, True, DEEP),
        (1024, 2816, True, True, FLOAT8_DEEP),
        (9216, 3072, False, False, GENERAL),
        (3072, 3072, False, True, GENERAL),
        (1280, 5120, True, True, GENERAL),
        (1152, 1152, False, True, GENERAL),
        (1152, 1152, True, True, GENERAL),
        (10240, 1280, True, False, FLOAT8_FEW_TERMS),
        (8192, 1536, True, False, GENERAL),
    ],
)
def test_what_a_product_is_decides_what_tiles_it_may_have(columns, terms, float8, adds, expected):
    assert candidates(columns, terms, float8=float8, adds=adds) is expected


def test_wide_products_in_float8_are_written_in_larger_pieces():
    assert {(tiles.columns, tiles.written) for tiles in FLOAT8_FEW_TERMS} == {(192, 64), (160, 32), (128, 64)}
    assert {tiles.written for tiles in (*GENERAL, *SHORT, *DEEP, *FLOAT8_DEEP)} == {32}

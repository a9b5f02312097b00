"""Rows of a shard by the number of inputs."""

import numpy as np
import pytest
from jobs import embed
from pictures import write_photos

import nopad
from nopad.embedding import shard_sizes
from nopad.embedding.borders import Borders, too_many_files
from nopad.embedding.plan import plan
from nopad.embedding.settings import Settings
from nopad.embedding.shard_sizes import default_shard_size


@pytest.mark.parametrize(
    ("inputs", "tokens", "rows"),
    [
        (0, False, (2048, 20_480)),
        (4_096_000, False, (2048, 20_480)),  # 2,000 files
        (4_096_001, False, (4096, 40_960)),
        (65_536_001, False, (32_768, 131_072)),  # of 128 MiB at 1,024 values
        (327_680_000, False, (32_768, 131_072)),  # 10,000 files
        (327_680_001, False, (65_536, 131_072)),
        (5_000_000_000, False, (131_072, 131_072)),
        (5_000_000_000, True, 512),
    ],
)
def test_the_default_grows_with_the_number_of_inputs(inputs, tokens, rows):
    assert default_shard_size(inputs, {}, tokens=tokens) == rows


def test_a_job_that_was_begun_keeps_its_default():
    assert default_shard_size(100_000_000, {"shard_size": "2048"}, tokens=False) == 2048
    assert default_shard_size(20_000_000, {"shard_size": "2048..20480"}, tokens=False) == (2048, 20_480)
    assert default_shard_size(1, {"shard_size": "16384..131072"}, tokens=False) == (16_384, 131_072)
    for given in ("5", "2048..4096"):  # which has to be given again
        assert default_shard_size(1, {"shard_size": given}, tokens=False) == (2048, 20_480)


def test_too_many_files():
    no_units = np.empty((0, 2), np.int64)
    for number in (0, 10_000):
        assert too_many_files(Borders.every(1, number), no_units, number) == ""
    assert too_many_files(Borders.every(2, 20_001), no_units, 20_001) == (
        "10,001 files in one folder: --shard-size 3 makes 6,667 files, or split the sources into several tables, which "
        "are read as one"
    )


def test_too_many_files_of_units():
    """Units of four rows: no size below eight joins two of them."""
    units = 4 * np.stack([np.arange(10_001), np.arange(1, 10_002)], axis=1)
    borders = Borders.at_units(units, (5, 5), 40_004)
    assert len(borders) == 10_001
    assert "--shard-size 8 makes 5,001 files" in too_many_files(borders, units, 40_004)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shard_sizes, "ENOUGH_FILES", 3)
    monkeypatch.setattr(shard_sizes, "MAX_FILES", 3)
    monkeypatch.setattr(shard_sizes, "SHARD_SIZE", 2)


def test_a_table_has_no_more_files_and_goes_on_with_its_size(small, tmp_path, model, stop_after, caplog):
    photos = write_photos(tmp_path / "photos", 9)
    out = tmp_path / "out"
    settings = Settings(model=str(model), device="cpu")
    assert plan([str(photos)], settings).shards == 3
    assert embed(photos, out, model, shard_size=None, **stop_after(1)).to_go == 5
    write_photos(photos, 13)
    assert plan([str(photos)], settings).shard_rows == 8
    assert embed(photos, out, model, shard_size=None).rows == 9
    assert len(list(out.glob("*.parquet"))) == 3
    assert not [line for line in caplog.messages if "files in one folder" in line]
    embed(photos, out, model, shard_size=None, update=True)
    assert len(nopad.read_features(out)) == 13
    assert [line for line in caplog.messages if "files in one folder" in line] == [
        "7 files in one folder with this update: embed what is new into a table of its own (another --out, without "
        "--update); several tables are read as one"
    ]


def test_a_size_that_makes_too_many_files_is_logged_once(small, photos, tmp_path, model, caplog):
    for _ in range(2):
        embed(photos, tmp_path / "out", model, shard_size=3)
    assert [line for line in caplog.messages if "files in one folder" in line] == [
        "4 files in one folder: --shard-size 4 makes 3 files, or split the sources into several tables, which are read "
        "as one"
    ]

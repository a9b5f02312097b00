"""Shards end where tars and row groups do."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from input_samples import write_parquet
from jobs import embed, rows, table
from pictures import write_photos

import nopad
from nopad.embedding import table_run
from nopad.embedding.borders import Borders
from nopad.embedding.inputs import listing_cache
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.plan import plan
from nopad.embedding.settings import Settings


@pytest.mark.parametrize(
    ("lengths", "rows", "expected"),
    [
        ([], (5, 50), []),
        ([-12], (5, 50), [5, 5, 2]),  # in no unit
        ([7, 50, 5, 6], (5, 50), [7, 50, 5, 6]),
        ([2, 2, 2, 2, 2, 1], (5, 50), [6, 5]),  # joined
        ([3, 47], (5, 50), [50]),
        ([2, 11], (5, 10), [4, 4, 5]),  # divided, with what is before it
        ([3, 11], (5, 10), [3, 3, 4, 4]),  # without
        ([2, 9], (4, 8), [2, 3, 3, 3]),  # half of a shard is before it
        ([12, 11], (5, 5), [4, 4, 4, 3, 4, 4]),
        ([3, 3, 4, 1, 5], (5, 5), [3, 3, 5, 5]),
        ([2, 4], (5, 5), [3, 3]),
        ([-3, 6, -11, 2, 4, -1], (5, 50), [9, 5, 5, 7, 1]),
    ],
)
def test_units_are_joined_or_divided(lengths, rows, expected):
    ends = np.cumsum(np.abs(lengths)).astype(np.int64)
    units = np.stack([ends - np.abs(lengths), ends], axis=1)[np.array(lengths) > 0] if lengths else np.empty((0, 2))
    borders = Borders.at_units(units.astype(np.int64), rows, sum(map(abs, lengths)))
    assert [len(shard) for shard in borders] == expected
    assert [place for shard in borders for place in shard] == list(range(sum(map(abs, lengths))))


@pytest.mark.parametrize("shard", [-1, 2])
def test_a_shard_that_is_not_there_is_an_error(shard):
    with pytest.raises(IndexError, match=f"shard {shard} of 2"):
        Borders.every(3, 5)[shard]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Tars of 2, 3, 7, 12 and 1 images, and some of other files."""
    photos = sorted(write_photos(tmp_path / "photos", 25).iterdir())
    folder = tmp_path / "tars"
    folder.mkdir()
    for number, size in enumerate((2, 3, 7, 0, 12, 1)):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            archive.add(__file__, "note.txt")
            for _ in range(size):
                photo = photos.pop(0)
                archive.add(photo, photo.name)
    return folder


def sources_of(folder: Path) -> list[list[str]]:
    """The tars of each shard, once for each row."""
    shards = [pq.read_table(path)["source"].to_pylist() for path in sorted(folder.glob("*.parquet"))]
    return [[os.path.basename(source) for source in shard] for shard in shards]


def test_a_tar_is_one_shard_or_part_of_a_run_of_tars(tars, tmp_path, model, stop_after, parts_in_process):
    planned = plan([str(tars)], Settings(model=str(model), device="cpu", shard_size=(5, 10)))
    assert (planned.shards, planned.shard_rows) == (6, 7)
    embed(tars, tmp_path / "whole", model, shard_size=(5, 10))
    expected = [["0.tar"] * 2 + ["1.tar"] * 3, ["2.tar"] * 7, *[["4.tar"] * 4] * 3, ["5.tar"]]
    assert sources_of(tmp_path / "whole") == expected
    embed(tars, tmp_path / "stopped", model, shard_size=(5, 10), **stop_after(2))
    assert len(table(tmp_path / "stopped")) == 2
    for part in (1, 0):
        embed(tars, tmp_path / "stopped", model, shard_size=(5, 10), part=(part, 2))
    assert table(tmp_path / "stopped") == table(tmp_path / "whole")
    features = nopad.read_features(tmp_path / "whole")
    assert [features.places.input(index).id for index in range(25)] == features.ids


def test_an_update_has_shards_of_what_is_new(tars, tmp_path, model):
    embed(tars / "[0-2].tar", tmp_path / "out", model, shard_size=(5, 10))
    embed(tars, tmp_path / "out", model, shard_size=(5, 10), update=True)
    new = sorted((tmp_path / "out").glob("shard-*-of-00004-*"))
    assert [pq.read_metadata(path).num_rows for path in new] == [4, 4, 4, 1]
    assert len(nopad.read_features(tmp_path / "out")) == 25
    embed(tars, tmp_path / "out", model, shard_size=(5, 10), update=True)
    assert len(rows(tmp_path / "out")) == 25


def test_a_job_that_was_begun_with_other_borders_keeps_them(tars, tmp_path, model, stop_after, monkeypatch):
    """As before tars mattered."""
    with monkeypatch.context() as patch:
        patch.setattr(table_run.Borders, "at_units", lambda _, rows, number, *others: Borders.every(rows[0], number))
        embed(tars, tmp_path, model, **stop_after(2))
    embed(tars, tmp_path, model)
    assert [len(shard) for shard in sources_of(tmp_path)] == [5] * 5


def test_borders_that_are_damaged_are_refused(tars, tmp_path, model, stop_after):
    embed(tars, tmp_path, model, **stop_after(1))
    path = tmp_path / ".nopad" / "shards.parquet"
    borders = Borders.load(path)
    Borders.every(5, 25).save(path, check=lambda: None)
    with pytest.raises(ValueError, match=r"shards\.parquet is not what job\.json was begun with"):
        embed(tars, tmp_path, model)
    path.unlink()
    with pytest.raises(ValueError, match="the job's files cannot be read"):
        embed(tars, tmp_path, model)
    borders.save(path, check=lambda: None)
    assert embed(tars, tmp_path, model).missing == 0


def test_row_groups_are_units(tmp_path, monkeypatch):
    monkeypatch.setattr(listing_cache, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(listing_cache, "_SETTLED_NS", -1)
    images = [b"%d" % number for number in range(10)]
    (tmp_path / "sources").mkdir()
    for number in range(2):
        columns = {"image": images, "name": [f"{number}-{row}" for row in range(10)]}
        write_parquet(tmp_path / "sources" / f"{number}.parquet", columns, row_group_size=4)
    expected = [[0, 4], [4, 8], [8, 10], [10, 14], [14, 18], [18, 20]]
    for options in ({}, {"id_column": "name"}):
        for _ in range(2):
            listing = list_inputs([str(tmp_path / "sources")], cache=ListingCache(tmp_path / "cache"), **options)
            assert listing.units.tolist() == expected

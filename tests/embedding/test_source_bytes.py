"""Shards end by the bytes of the sources where the user gives no size of them."""

import tarfile

import numpy as np
import pytest
from input_samples import write_parquet
from jobs import embed, table
from pictures import write_photos

from nopad.embedding import shard_sizes
from nopad.embedding.borders import Borders
from nopad.embedding.inputs import listing, source_bytes
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.plan import plan
from nopad.embedding.settings import Settings


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(shard_sizes, "MIN_BYTES", 100)
    monkeypatch.setattr(shard_sizes, "MAX_BYTES", 1000)
    monkeypatch.setattr(shard_sizes, "ENOUGH_FILES", 8)


def units_of(lengths: list[int]) -> np.ndarray:
    """Units of these numbers of inputs, but for negative ones, which are in none."""
    ends = np.cumsum(np.abs(lengths)).astype(np.int64)
    return np.stack([ends - np.abs(lengths), ends], axis=1)[np.array(lengths) > 0]


@pytest.mark.parametrize(
    ("lengths", "sizes", "expected"),
    [
        ([-12], [10] * 12, [5, 5, 2]),
        ([-6], [900, 200, 300, 300, 400, 3000], [1, 3, 1, 1]),  # of more than 1,000 bytes
        ([2, 1, 2, 3], [40, 40, 40, 99, 99, 10, 10, 10], [3, 2, 3]),  # joined up to 100
        ([4], [250, 250, 250, 251], [2, 2]),
        ([2, 4], [30, 30, 300, 300, 300, 300], [2, 2, 2]),  # half full before one that is divided
        ([2, 4], [10, 10, 300, 300, 300, 300], [3, 3]),
        ([2, 2], [0] * 4, [4]),  # not known
        ([1], [10_000], [1]),
        ([1] * 16, [100] * 16, [2] * 8),  # of at most eight shards
        ([-16], [1100] * 16, [3, 3, 3, 3, 3, 1]),
        ([1] * 33, [100] * 33, [5, 5, 5, 5, 5, 5, 3]),
    ],
)
def test_units_are_joined_and_divided_by_bytes(lengths, sizes, expected):
    borders = Borders.at_units(units_of(lengths), (5, 50), len(sizes), SourceBytes([np.array(sizes)]))
    assert [len(shard) for shard in borders] == expected


def test_rows_go_before_bytes_where_shards_are_too_many():
    number = 100
    every = Borders.at_units(units_of([1] * number), (5, 50), number, SourceBytes([np.full(number, 100)]))
    assert [len(shard) for shard in every] == [5] * 20


def test_bytes_of_inputs_are_those_of_members_and_shares_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 4)
    monkeypatch.setattr(source_bytes, "BLOCK", 4)
    (tmp_path / "photos").mkdir()
    for number, size in enumerate((7, 11)):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"x" * size)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):  # the last of them in another block
            archive.add(tmp_path / "photos" / f"{number % 2}.jpg", f"{number}.jpg")
    write_parquet(tmp_path / "b.parquet", {"image": [b"x"] * 11})
    share = (tmp_path / "b.parquet").stat().st_size // 11
    (tmp_path / "missing.lst").write_text("gone.jpg\n")
    names = ["photos", "b.parquet", "a.tar", "missing.lst", "b.parquet"]
    inputs = list_inputs([str(tmp_path / name) for name in names]).inputs
    sizes = SourceBytes.of(inputs, StampSpool.of(inputs, contents=False))
    expected = [7, 11, *[share] * 11, 7, 11, 7, 11, 0, *[share] * 11]
    assert [sizes.between(place, place + 1) for place in range(len(inputs))] == expected
    assert sizes.between(1, 4) == 11 + 2 * share
    assert [sizes.fitting(0, 3, limit) for limit in (1, 7, 17, 18, 10_000)] == [1, 1, 1, 2, 3]


def test_a_job_and_its_update_have_shards_of_few_large_images(tmp_path, model, monkeypatch, stop_after):
    photos = write_photos(tmp_path / "photos", 9)
    largest = max(path.stat().st_size for path in photos.iterdir())
    monkeypatch.setattr(shard_sizes, "MAX_BYTES", largest)
    planned = plan([str(photos)], Settings(model=str(model), device="cpu"))
    embed(photos, tmp_path / "whole", model, shard_size=None)
    whole = table(tmp_path / "whole")
    assert len(whole) == planned.shards > 3
    embed(photos, tmp_path / "stopped", model, shard_size=None, **stop_after(2))
    with monkeypatch.context() as patch:  # as of another version: the job keeps its shards
        patch.setattr(shard_sizes, "MAX_BYTES", 1 << 40)
        embed(photos, tmp_path / "stopped", model, shard_size=None)
    assert table(tmp_path / "stopped") == whole
    write_photos(photos, 9, start=9)
    embed(photos, tmp_path / "whole", model, shard_size=None, update=True)
    assert len(table(tmp_path / "whole")) > len(whole) + 3


def test_rows_that_are_given_are_kept(tmp_path, model):
    embed(write_photos(tmp_path / "photos", 9), tmp_path / "out", model, shard_size=5)
    assert len(table(tmp_path / "out")) == 2

"""Whole tars as inputs of a list: which tars are whole, what is found in them, and how many images are expected."""

import gzip
import io
import os
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from input_samples import fill, kinds, picture, write_parquet, write_tar

from nopad.embedding import shard_sizes
from nopad.embedding.borders import Borders, too_many_files, with_borders
from nopad.embedding.inputs import listing, near_reads, whole_tars
from nopad.embedding.inputs.archives import COMPRESSED
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.near_reads import NearReads
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.shares import ShareOptions, num_files
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.inputs.whole_tars import (
    NO_TARS,
    WHOLE_TAR,
    ExpectedImages,
    Found,
    WholeTars,
    expanded,
    whole_tar,
)
from nopad.preprocessing.decode import RefusedError, UnreachableError
from nopad.storage.errors import UnusableStoreError
from nopad.storage.store import Stored


@pytest.fixture(autouse=True)
def _small(monkeypatch) -> None:
    monkeypatch.setattr(whole_tars, "MIN_BYTES", 1)
    monkeypatch.setattr(whole_tars, "IMAGE_BYTES", 4)


@pytest.fixture
def tar(tmp_path) -> Path:
    """Of 24 images, between which there are texts."""
    members = [(f"{number:02}.{suffix}", picture(number)) for number in range(24) for suffix in ("png", "txt")]
    return write_tar(tmp_path / "a.tar", members)


@pytest.fixture
def item(tar) -> Input:
    (found,) = list_inputs([str(tar)], whole_tars=True).inputs
    return found


# Which tars are whole


def test_limits_are_sizes_of_whole_tars(tar, monkeypatch):
    size = tar.stat().st_size
    for smallest, largest, is_whole in ((size, size, True), (size + 1, size + 1, False), (1, size - 1, False)):
        monkeypatch.setattr(whole_tars, "MIN_BYTES", smallest)
        monkeypatch.setattr(whole_tars, "MAX_BYTES", largest)
        assert (whole_tar(str(tar), str(tar), None, hidden=False) is not None) == is_whole


def test_objects_have_the_time_that_every_request_says(monkeypatch):
    path, stored = "s3://photos/a.tar", Stored("a.tar", 5000, 5_999_999_999)
    listed = whole_tar(path, path, stored, hidden=False)
    assert listed == Input("a.tar", path, WHOLE_TAR, path.encode(), offset=5_000_000_000, size=5000)
    monkeypatch.setattr(whole_tars.objects, "stat", lambda *_: replace(stored, mtime_ns=5_000_000_000))
    assert whole_tar(path, path, None, hidden=False) == listed


def test_objects_that_a_prefix_lists_need_no_request(monkeypatch):
    monkeypatch.setattr(whole_tars.objects, "stat", None)
    assert whole_tar("s3://photos/a.tar", "", Stored("a.tar", 5000, 0), hidden=False) is not None


def test_compressed_and_missing_tars_are_not_whole(tar, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    (folder / "b.tar").write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(ValueError, match="a compressed tar has no random access"):
        list_inputs([str(folder / "b.tar")], whole_tars=True)
    assert kinds(list_inputs([str(folder), str(tar)], whole_tars=True)) == ["broken", WHOLE_TAR]
    assert whole_tar(str(tmp_path / "none.tar"), "", None, hidden=False) is None


def test_other_files_beside_tars_are_listed(tar, tmp_path):
    write_parquet(tmp_path / "b.parquet", {"image": [picture(), picture()]})
    assert kinds(list_inputs([str(tmp_path)], whole_tars=True)) == [WHOLE_TAR, "parquet", "parquet"]


def test_no_process_lists_whole_tars(tar, tmp_path):
    for is_whole, number in ((False, 1), (True, 0)):
        options = ShareOptions((str(tmp_path),), None, None, False, None, is_whole)
        assert num_files(options, ListingCache(tmp_path / "cache"), lambda: None) == (1, number)


def test_tars_of_all_blocks_of_a_list_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "BLOCK", 2)
    fill(tmp_path, "0.png", "1.png", "2.png")
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("a.png", picture())] * (1 + 100 * number))
    sources = [str(tmp_path / f"{number}.{suffix}") for number in range(3) for suffix in ("png", "tar")]
    listed = list_inputs(sources, whole_tars=True)
    tars = WholeTars.of(listed.inputs)
    assert tars.places.tolist() == listed.whole_tars.places.tolist() == [1, 3, 5]
    sizes = [(tmp_path / f"{number}.tar").stat().st_size for number in range(3)]
    assert tars.sizes.tolist() == listed.whole_tars.sizes.tolist() == sizes


# What is found in them


def test_a_tar_that_is_compressed_now_is_one_failed_row(item):
    data = Path(os.fsdecode(item.path)).read_bytes()
    Path(os.fsdecode(item.path)).write_bytes(gzip.compress(data).ljust(len(data), b"\0"))
    assert [*expanded([item], None)] == [Input("a.tar", item.source, "broken", item.path, note=COMPRESSED)]


@pytest.mark.parametrize(
    ("names", "left_out"), [([], "nothing"), (["a", "b", "c.txt"], "2 without suffix, 1 .txt")], ids=["empty", "texts"]
)
def test_a_tar_without_images_is_one_failed_row(tmp_path, names, left_out):
    path = write_tar(tmp_path / "a.tar", [(name, b"text") for name in names])
    (item,) = list_inputs([str(path)], whole_tars=True).inputs
    note = f"no image in it; left out: {left_out}"
    assert [*expanded([item], None)] == [Input("a.tar", str(path), "broken", item.path, note=note)]


def test_hard_links_lead_back_and_no_byte_is_counted_twice(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data := picture())
            archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo(f"link-{name}")
            link.type, link.linkname = tarfile.LNKTYPE, "a.png"
            archive.addfile(link)
    found, read = Found(), [0]
    listed = list_inputs([str(tmp_path / "a.tar")], whole_tars=True)
    for _ in expanded(listed.inputs, None, found):
        read.append(found.bytes)
    assert (found.images, read) == (4, sorted(read))
    assert read[-1] < found.bytes == listed.whole_tars.num_bytes


@pytest.mark.parametrize("error", [UnreachableError, RefusedError])
def test_a_tar_whose_size_cannot_be_requested_is_named(item, monkeypatch, error):
    def fail(place):
        raise error("somewhere", "unreachable: no answer")

    monkeypatch.setattr("nopad.embedding.inputs.media.file_size", fail)
    with pytest.raises(error) as raised:
        [*expanded([item], None)]
    assert type(raised.value) is error
    assert (raised.value.source, raised.value.reason) == (item.source, "unreachable: no answer")


@pytest.mark.parametrize(
    "error",
    [
        UnreachableError("a", "unreachable: no answer"),
        UnreachableSourceError("no answer"),
        UnusableStoreError("no answer"),
    ],
    ids=["file", "source", "store"],
)
def test_tars_that_cannot_be_reached_are_errors_or_rows(item, monkeypatch, error):
    def fail(*_):
        raise error
        yield

    monkeypatch.setattr(whole_tars, "members", fail)
    with pytest.raises(type(error)):
        [*expanded([item], None)]
    (row,) = expanded([item], None, unreachable_rows=True)
    assert (row.id, row.kind, row.note) == ("a.tar", "broken", "unreachable: no answer")


def test_waits_of_every_read_are_bounded(item, monkeypatch):
    limits = []

    def size(place):
        limits.append(place.timeout)
        return item.size

    def inputs(*_, timeout, **options):
        limits.append(timeout)
        return iter([])

    monkeypatch.setattr("nopad.embedding.inputs.media.file_size", size)
    monkeypatch.setattr(whole_tars, "tar_inputs", inputs)
    assert [each.kind for each in expanded([item], 7.0)] == ["broken"]
    assert limits == [7.0, 7.0]


def test_whoever_takes_no_more_ends_the_thread(item):
    before = {*threading.enumerate()}
    images = expanded([item], None)
    next(images)
    (thread,) = {*threading.enumerate()} - before
    images.close()
    thread.join(60)
    assert not thread.is_alive()


# How many images are expected


def test_tars_within_a_part_of_a_list_and_among_chosen_inputs():
    tars = WholeTars(np.array([1, 3, 4]), np.array([8, 80, 2]))  # of two images, 20 and less than one
    for places, expected in ((range(1, 4), ([1, 3], [8, 80])), (range(2, 3), ([], [])), (range(4, 9), ([4], [2]))):
        within = tars.within(places)
        assert (within.places.tolist(), within.sizes.tolist()) == expected
    among = tars.among(np.array([0, 3, 4, 6]))
    assert (among.places.tolist(), among.sizes.tolist()) == ([1, 2], [80, 2])
    assert tars.num_images(6) == 2 + 20 + 1 + 3
    images = ExpectedImages(tars)
    expected = {(0, 6): 26, (1, 3): 3, (3, 4): 20, (2, 3): 1, (4, 6): 2, (3, 3): 0}
    assert {places: images.between(*places) for places in expected} == expected


def test_borders_count_images_with_the_sizes_of_sources_and_without():
    sizes = np.array([500, 500, 500, 3000, 700, 700], np.int64)
    tars, units = WholeTars(np.arange(6), sizes), np.array([[place, place + 1] for place in range(6)])
    for of_sources in (None, SourceBytes([sizes])):
        borders = Borders.at_units(units, (300, 500), 6, of_sources, tars)
        assert [(each.start, each.stop) for each in borders] == [(0, 3), (3, 4), (4, 6)]  # no tar is divided


def test_a_tar_that_is_listed_twice_has_all_its_bytes_each_time(tar):
    inputs = list_inputs([str(tar), str(tar)], whole_tars=True).inputs
    sizes = SourceBytes.of(inputs, StampSpool.of(inputs, contents=False))
    assert [sizes.between(0, 1), sizes.between(1, 2)] == [tar.stat().st_size] * 2


def test_a_record_says_whether_tars_are_whole():
    tars = WholeTars(np.array([0]), np.array([8]))
    for borders in (Borders.every(5, 8), Borders.every(3, 8)):
        assert with_borders({"shard_size": "5"}, borders, 8, tars)["tars"] == "whole"
        assert "tars" not in with_borders({"shard_size": "5"}, borders, 8, NO_TARS)


def test_advice_on_too_many_files_counts_images(monkeypatch):
    monkeypatch.setattr(shard_sizes, "MAX_FILES", 3)
    tars, units = WholeTars(np.arange(6), np.full(6, 400)), np.array([[place, place + 1] for place in range(6)])
    borders = Borders.at_units(units, (50, 500), 6, None, tars)
    assert len(borders) == 6
    assert too_many_files(borders, units, 6, tars).startswith("6 files in one folder: --shard-size 200 makes 3 files,")


# Images of objects, near what was found


def test_images_of_objects_are_far_until_they_are_read(monkeypatch):
    monkeypatch.setattr(near_reads, "MAX_BYTES", 10)
    member = Input("a.png", "s3://photos/a.tar", "tar", b"s3://photos/a.tar", size=6)
    near = NearReads(lambda item: item.id)
    items = near.listed([member, replace(member, kind="image"), replace(member, path=b"/a.tar"), member, member])
    assert [(next(items) and near.is_far()) for _ in range(4)] == [False, False, False, True]
    assert (near.read(member), near.is_far()) == ("a.png", False)
    next(items)
    assert near.is_far()
    near.read(replace(member, kind="image"))
    near.read(replace(member, path=b"/a.tar"))
    assert near.is_far()
    near.read(member)
    assert not near.is_far()

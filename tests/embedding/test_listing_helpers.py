"""Tars listed by several processes, and by parts."""

import logging
import re
import tarfile
import threading
from pathlib import Path

import pytest
from input_samples import wait_until_settled, write_parquet
from jobs import embed, table
from pictures import write_photos

from nopad.embedding import listing_helpers
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.shares import Share
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.listing_helpers import list_in_shares
from nopad.embedding.settings import Settings


@pytest.fixture(autouse=True)
def two_processes(monkeypatch) -> None:
    """Two processes list a few files."""
    monkeypatch.setattr(listing_helpers, "MIN_FILES", 3)
    monkeypatch.setattr(listing_helpers, "num_cores", lambda: 2)


@pytest.fixture(scope="module")
def settled(tmp_path_factory) -> Path:
    """A folder of six tars of two images each, one that is cut short, and a Parquet file; old enough to be kept."""
    folder = tmp_path_factory.mktemp("tars")
    photos = write_photos(tmp_path_factory.mktemp("photos"), 12)
    for number in range(6):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for name in (2 * number, 2 * number + 1):
                archive.add(photos / f"{name:03}.png", f"{name:03}.png")
    (folder / "cut.tar").write_bytes((folder / "0.tar").read_bytes()[:700])
    write_parquet(folder / "table.parquet", {"image": [(photos / "000.png").read_bytes()] * 3})
    wait_until_settled(folder)
    return folder


def in_shares(source: Path, out: Path, stop=None, **options) -> None:
    settings = Settings(model="untrained:none", **options)
    list_in_shares([str(source)], settings, JobFolder(out), None, stop or threading.Event())


def content(source: Path, out: Path | None) -> tuple:
    cache = ListingCache(None) if out is None else JobFolder(out).listing_cache()
    listing = list_inputs([str(source)], cache=cache)
    return list(listing.inputs), listing.left_out, listing.units.tolist()


def test_processes_list_for_the_command(settled, tmp_path, read_tars, monkeypatch, caplog):
    """How far they are is logged."""
    caplog.set_level(logging.INFO, "nopad")
    monkeypatch.setattr(listing_helpers, "_REPORT_SECONDS", 0.0)
    in_shares(settled, tmp_path / "out")
    assert re.search(r"listing: \d of 8 tars and Parquet files so far", caplog.text)
    assert read_tars == []
    assert JobFolder(tmp_path / "out").listing_cache().num_files == 7
    assert content(settled, tmp_path / "out") == content(settled, None)
    without_what_is_kept = [name for name in read_tars if name != "cut.tar"]
    assert without_what_is_kept == [f"{number}.tar" for number in range(6)]
    monkeypatch.setattr(listing_helpers, "_process", pytest.fail)
    in_shares(settled, tmp_path / "out")  # of what is new there is too little


def test_each_part_lists_its_share(settled, tmp_path, read_tars):
    for part in range(3):
        in_shares(settled, tmp_path / "out", part=(part, 3))
    assert sorted(read_tars) == sorted(path.name for path in settled.glob("*.tar"))
    read_tars.clear()
    content(settled, tmp_path / "out")
    assert read_tars == ["cut.tar"]


@pytest.mark.parametrize(("total", "files"), [(1, 5), (3, 7), (2, 1000), (8, 10_000)])
def test_shares_have_every_file_once(total, files):
    shares = [Share.of(number, total, files) for number in range(total)]
    assert all(sum(share.has(place) for share in shares) == 1 for place in range(files))
    sizes = [sum(map(share.has, range(files))) for share in shares]
    assert max(sizes) - min(sizes) <= shares[0].run


def test_a_process_that_dies_leaves_its_share_to_the_command(settled, tmp_path, monkeypatch):
    start = listing_helpers._process

    def process(request):
        started = start(request)
        if request[2].number == 0:
            started.kill()
        return started

    monkeypatch.setattr(listing_helpers, "_process", process)
    in_shares(settled, tmp_path / "out")
    assert 0 < JobFolder(tmp_path / "out").listing_cache().num_files < 7
    assert content(settled, tmp_path / "out") == content(settled, None)


def test_a_stop_ends_the_processes(settled, tmp_path, monkeypatch):
    stop, started = threading.Event(), []
    start = listing_helpers._process

    def process(request):
        started.append(start(request))
        stop.set()
        return started[-1]

    monkeypatch.setattr(listing_helpers, "_process", process)
    with pytest.raises(InterruptedError):
        in_shares(settled, tmp_path / "out", stop)
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_sources_that_are_wrong_are_left_to_the_command(tmp_path):
    in_shares(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(ValueError, match="missing"):
        content(tmp_path / "missing", tmp_path / "out")


def test_the_table_is_that_of_one_process(settled, tmp_path, model, monkeypatch, parts_in_process):
    embed(settled, tmp_path / "helped", model, shard_size=(4, 8))
    assert JobFolder(tmp_path / "helped").listing_cache().num_files == 7
    for part in (1, 0):
        embed(settled, tmp_path / "parts", model, shard_size=(4, 8), part=(part, 2))
    monkeypatch.setattr(listing_helpers, "num_cores", lambda: 1)
    embed(settled, tmp_path / "alone", model, shard_size=(4, 8))
    assert table(tmp_path / "helped") == table(tmp_path / "parts") == table(tmp_path / "alone")

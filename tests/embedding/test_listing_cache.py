"""Listings of tars and tables that are kept: files that are the same are not listed again."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from input_samples import write_parquet
from jobs import embed, table
from pictures import write_photos

from nopad.cli import main
from nopad.embedding.inputs import archive_listing, listing, listing_cache, sources
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.sources import Listing, list_inputs
from nopad.embedding.inputs.table_pool import TablePool
from nopad.storage import objects
from nopad.storage.object_path import ObjectPath

LONG_AGO = 10**18


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of four tars, each of two images and a text."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(4):
        write_tar(folder / f"{number}.tar", f"{number}-a.png", f"{number}-b.png", "note.txt")
    return folder


def write_tar(path: Path, *names: str) -> None:
    photos = write_photos(path.parent.parent / "photos", 1)
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.add(photos / "000.png", name)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.fixture(autouse=True)
def keep_all(monkeypatch) -> None:
    monkeypatch.setattr(listing_cache, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(listing_cache, "_SETTLED_NS", -1)
    monkeypatch.setattr(sources, "NUM_ARCHIVES", 1)  # in their order


def listed(source: Path, cache: Path | None, **options) -> Listing:
    return list_inputs([str(source)], cache=ListingCache(cache), **options)


def content(listing: Listing) -> tuple:
    return list(listing.inputs), listing.inputs.digest(), listing.left_out


def test_tars_are_listed_once(tars, tmp_path, read_tars):
    without = content(listed(tars, None))
    assert without[2] == {".txt": 4}
    assert content(listed(tars, tmp_path / "cache")) == without
    assert read_tars == ["0.tar", "1.tar", "2.tar", "3.tar"] * 2
    read_tars.clear()
    assert content(listed(tars, tmp_path / "cache")) == without
    assert read_tars == []


def test_a_listing_that_was_killed_goes_on(tars, tmp_path, read_tars):
    program = f"""
import os, signal
from nopad.embedding.inputs import archive_listing, listing_cache, sources

def killed_at_the_third(path, *arguments, **options):
    if path.endswith("2.tar"):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *arguments, **options)

real, archive_listing.tar_inputs = archive_listing.tar_inputs, killed_at_the_third
listing_cache.MIN_SECONDS, sources.NUM_ARCHIVES = 0, 1
listing_cache._SETTLED_NS = -1
sources.list_inputs([{str(tars)!r}], cache=listing_cache.ListingCache(listing_cache.Path({str(tmp_path / "cache")!r})))
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert content(listed(tars, tmp_path / "cache"))[0] == list(listed(tars, None).inputs)
    assert read_tars[:2] == ["2.tar", "3.tar"]


def test_a_tar_that_cannot_be_listed_leaves_the_others(tars, tmp_path, read_tars, monkeypatch):
    def interrupted(path, *arguments, **options):
        if path.endswith("3.tar"):
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    real = archive_listing.tar_inputs
    with monkeypatch.context() as patch:
        patch.setattr(archive_listing, "tar_inputs", interrupted)
        patch.setattr(listing_cache, "MIN_SECONDS", 1e-9)
        with pytest.raises(KeyboardInterrupt):
            listed(tars, tmp_path / "cache")
    read_tars.clear()
    listed(tars, tmp_path / "cache")
    assert read_tars == ["3.tar"]


def test_a_signal_ends_the_listing_and_what_was_listed_is_kept(tars, tmp_path, model, read_tars, monkeypatch, capsys):
    def interrupted(path, *arguments, **options):
        if path.endswith("2.tar"):
            signal.raise_signal(signal.SIGINT)
        return real(path, *arguments, **options)

    real = archive_listing.tar_inputs
    command = ["embed", str(tars), "--out", str(tmp_path / "out"), "--model", str(model)]
    with monkeypatch.context() as patch:
        patch.setattr(archive_listing, "tar_inputs", interrupted)
        assert main(command) == 130
    assert "stopped while the sources were listed; to go on: " in capsys.readouterr().err
    assert read_tars == ["0.tar", "1.tar", "2.tar"]
    read_tars.clear()
    assert main(command) == 0
    assert read_tars == ["2.tar", "3.tar"]


def test_a_stop_ends_the_listing_of_a_folder_without_images(tmp_path):
    (tmp_path / "sources" / "texts").mkdir(parents=True)
    stop = threading.Event()
    stop.set()
    for source in (tmp_path / "sources", tmp_path / "sources/**/*.jpg"):
        with pytest.raises(InterruptedError, match="stopped while the sources were listed"):
            list_inputs([str(source)], stop=stop)


def test_a_plan_leaves_its_listing_to_the_job_and_finds_that_of_one(tars, tmp_path, model, read_tars):
    options = [str(tars), "--out", str(tmp_path / "out"), "--model", str(model)]
    assert main(["plan", *options, "--sample", "2"]) == 0
    assert read_tars == ["0.tar", "1.tar", "2.tar", "3.tar"]
    read_tars.clear()
    assert main(["embed", *options]) == 0
    assert main(["plan", *options, "--sample", "2"]) == 0
    assert read_tars == []


@pytest.mark.parametrize("how", ["size", "time", "moved", "options", "damaged"])
def test_what_is_another_now_is_listed_again(tars, tmp_path, read_tars, how):
    listed(tars, tmp_path / "cache")
    read_tars.clear()
    options = {}
    if how == "size":
        write_tar(tars / "1.tar", *(f"{number}.png" for number in range(30)))
    elif how == "time":
        os.utime(tars / "1.tar", ns=(LONG_AGO, LONG_AGO + 1))
    elif how == "moved":  # of one size and time
        (tars / "0.tar").rename(tars / "1.tar")
        write_tar(tars / "0.tar", "0-a.png", "0-b.png", "note.txt")
    elif how == "options":
        options["hidden"] = True
    else:
        for path in (tmp_path / "cache").iterdir():
            path.write_bytes(path.read_bytes()[:-20])
    got = content(listed(tars, tmp_path / "cache", **options))
    again = {"size": ["1.tar"], "time": ["1.tar"], "moved": ["0.tar", "1.tar"]}
    assert read_tars == again.get(how, ["0.tar", "1.tar", "2.tar", "3.tar"])
    assert got == content(listed(tars, None, **options))
    read_tars.clear()
    assert content(listed(tars, tmp_path / "cache", **options)) == got
    assert read_tars == []


def test_what_another_version_listed_is_listed_again(tars, tmp_path, read_tars, monkeypatch):
    listed(tars, tmp_path / "cache")
    read_tars.clear()
    monkeypatch.setattr(listing_cache, "__version__", "another")
    listed(tars, tmp_path / "cache")
    assert read_tars == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_a_list_that_ends_in_damage_is_none(tars, tmp_path, read_tars, monkeypatch):
    """Its first blocks are read before the damage is seen."""
    monkeypatch.setattr(listing, "BLOCK", 2)
    write_tar(tars / "3.tar", *(f"{number}.png" for number in range(7)), "note.txt")
    expected = content(listed(tars, tmp_path / "cache"))
    (path,) = (path for path in (tmp_path / "cache").iterdir() if "3.tar" in InputList.load(path).metadata["files"])
    ids = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    data[ids.data_page_offset + 20 : ids.data_page_offset + 60] = bytes(40)
    path.write_bytes(data)
    read_tars.clear()
    cache = ListingCache(tmp_path / "cache")
    result = list_inputs([str(tars)], cache=cache)
    assert content(result) == expected
    assert read_tars == ["3.tar"]
    cache.clean()
    assert not path.exists()
    assert content(listed(tars, tmp_path / "cache")) == expected
    assert read_tars == ["3.tar"]


def test_lists_that_another_command_removes_are_none(tars, tmp_path, read_tars):
    expected = content(listed(tars, tmp_path / "cache"))
    cache = ListingCache(tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    read_tars.clear()
    assert content(list_inputs([str(tars)], cache=cache)) == expected
    assert read_tars == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_inputs_of_short_files_do_not_bring_a_block_each(tars, tmp_path):
    """The dictionaries of a block have the names of all files: with each file they would take the square of these."""
    paths = [os.fsencode(path) for path in sorted(tars.iterdir())]
    items = [Input("a.png", path.decode(), "tar", path, 512, 1) for path in paths]
    for listed_now in (items, [None] * 4):
        with ListingCache(tmp_path / "cache") as cache:
            got = []
            for path, item in zip(paths, listed_now, strict=True):
                lookup = cache.look_up(path, [], None)
                lookup.check()
                got += cache.inputs(lookup, Counter(), lambda _: iter(()), iter([item]))
        assert got == items


def test_a_file_of_this_moment_is_not_trusted(tars, tmp_path, read_tars, monkeypatch):
    """It may change again without its size and time: file systems have times of up to two seconds."""
    monkeypatch.setattr(listing_cache, "_SETTLED_NS", 3600 * 10**9)
    for _ in range(2):
        read_tars.clear()
        listed(tars, tmp_path / "cache")
    assert read_tars == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_a_damaged_tar_is_listed_again(tars, tmp_path, read_tars):
    (tars / "1.tar").write_bytes((tars / "1.tar").read_bytes()[:1024])
    os.utime(tars / "1.tar", ns=(LONG_AGO, LONG_AGO))
    for _ in range(2):
        read_tars.clear()
        assert [item.kind for item in listed(tars, tmp_path / "cache").inputs].count("broken") == 1
    assert read_tars == ["1.tar"]


def test_tables_are_listed_once(tmp_path, monkeypatch):
    (tmp_path / "tables").mkdir()
    for number in range(2):
        write_parquet(tmp_path / "tables" / f"{number}.parquet", {"image": [b"a", b"b"], "name": ["x", "y"]})
    first = content(listed(tmp_path / "tables", tmp_path / "cache", id_column="name"))
    numbered = content(listed(tmp_path / "tables", tmp_path / "cache"))
    assert [item.id for item in first[0]] == ["x", "y"] * 2
    assert [item.id for item in numbered[0]] == ["0", "1"] * 2
    monkeypatch.setattr(TablePool, "inputs", None)
    assert content(listed(tmp_path / "tables", tmp_path / "cache", id_column="name")) == first


def test_lists_of_no_use_are_removed(tars, tmp_path):
    cache = tmp_path / "cache"
    listed(tars, cache)
    before = set(cache.iterdir())
    write_tar(tars / "1.tar", "x.png")
    again = ListingCache(cache)
    list_inputs([str(tars)], cache=again)
    again.clean()
    left = set(cache.iterdir())
    assert len(before - left) == 1
    assert len(left - before) == 1


def test_no_link_is_written_through(tars, tmp_path, read_tars):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to("elsewhere")
    for _ in range(2):
        listed(tars, tmp_path / "cache")
    assert len(read_tars) == 8
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_job_that_goes_on_reads_no_tar_to_list_it(tars, tmp_path, model, read_tars, stop_after):
    embed(tars, tmp_path / "whole", model)
    embed(tars, tmp_path / "out", model, **stop_after(1))
    read_tars.clear()
    assert embed(tars, tmp_path / "out", model).done == 4
    assert read_tars == []
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    write_tar(tars / "4.tar", "4-a.png")
    summary = embed(tars, tmp_path / "out", model, update=True)
    assert summary.changes == ["in the sources 1 are new, 0 have changed, 0 are gone"]
    assert read_tars == ["4.tar"]


def test_a_listing_reports_how_far_it_is(tars, monkeypatch, caplog):
    from nopad.embedding.inputs import sources

    monkeypatch.setattr(sources, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(sources, "_MAX_REPORT_SECONDS", 0.0)
    with caplog.at_level("INFO", "nopad"):
        listed(tars, None)
    assert f"listing: 3 inputs so far, file 2 of 4 of {tars}" in caplog.text


@pytest.mark.parametrize("source", ["s3://photos/tars", "s3://photos/tars/*.tar", "s3://photos/tars/{0,1,2,3}.tar"])
def test_tars_in_a_store_are_listed_once(s3, tars, source):
    s3.put_all(tars, "tars/")

    def listed() -> tuple:
        objects.forget()
        s3.server.requests.clear()
        cache = ListingCache(ObjectPath("s3://photos/table/.nopad/listing"))
        return content(list_inputs([source], cache=cache))

    def reads() -> list[str]:
        return [line for line in s3.server.requests if line.startswith("GET") and ".tar" in line]

    first = listed()
    assert (len(first[0]), len(reads())) == (8, 4)
    assert listed() == first
    assert reads() == []
    write_tar(tars / "1.tar", "another.png")
    s3.put_all(tars, "tars/")
    assert [item.id for item in listed()[0]].count("another.png") == 1
    assert len(reads()) == 1

"""Tars and Parquet files are listed a few at a time, and come in their order."""

import os
import tarfile
import threading
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import pytest
from input_samples import ids, picture, write_parquet

from nopad.embedding.inputs import archive_listing, sources
from nopad.embedding.inputs.ahead import Ahead, begun_ahead
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.sources import list_inputs

TIMEOUT = 60


def have_ended(name: str = "nopad-list") -> bool:
    """Whether no such thread is left, after some seconds at most."""
    end = time.monotonic() + TIMEOUT
    while any(thread.name == name for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    return time.monotonic() < end


@pytest.mark.parametrize("number", [0, 1, 255, 256, 1000])
def test_items_come_in_their_order(number):
    assert list(Ahead(range(number))) == list(range(number))
    assert have_ended()


@pytest.mark.parametrize("kind", [LookupError, SystemExit])
def test_an_error_comes_after_the_items_before_it(kind):
    def items() -> Iterator[int]:
        yield from range(300)
        raise kind("at the end")

    taken = []
    with pytest.raises(kind, match="at the end"):
        taken.extend(iter(Ahead(items())))
    assert taken == list(range(300))


def test_few_items_wait_and_none_is_computed_after_the_end():
    computed = count()
    ahead = Ahead(iter(lambda: next(computed), -1))
    assert next(iter(ahead)) == 0
    ahead.close()
    assert have_ended()
    assert next(computed) < 10_000


def test_no_more_items_are_computed_than_may_wait():
    release, computed = threading.Event(), count(1)

    def items() -> Iterator[int]:
        while (number := next(computed)) < 1000:
            yield number
        release.set()

    ahead = Ahead(items(), batch=2, max_batches=3)
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "nopad-list")
    assert next(iter(ahead)) == 1
    assert not release.wait(0.5)
    ahead.close()
    assert have_ended()
    assert next(computed) <= 12  # a batch that was taken, three that wait, one that is handed over, and the next item


def test_few_entries_wait_where_none_is_begun(monkeypatch):
    monkeypatch.setattr("nopad.embedding.inputs.ahead._MAX_WAITING", 5)
    computed = count()
    assert next(begun_ahead(iter(lambda: next(computed), 100), lambda entry: False, 3)) == 0
    assert next(computed) == 5


def test_entries_are_begun_ahead():
    begun: list[int] = []

    def entries() -> Iterator[int]:
        yield from range(10)
        raise LookupError("at the end")

    def begin(entry: int) -> bool:
        if entry % 2:
            begun.append(entry)
        return entry % 2 == 1

    seen: list[tuple[int, int]] = []

    def take() -> None:
        for entry in begun_ahead(entries(), begin, 3):
            seen.append((entry, begun[-1]))

    with pytest.raises(LookupError):
        take()
    assert seen == [*zip(range(10), (5, 5, 7, 7, 9, 9, 9, 9, 9, 9), strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve tars and a Parquet file, of another number of images each."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(12):
        with tarfile.open(folder / f"{number:02}.tar", "w") as archive:
            (tmp_path / "image.png").write_bytes(picture(number))
            for member in range(number % 5):
                archive.add(tmp_path / "image.png", f"{number}-{member}.png")
            archive.add(__file__, "note.txt")
    write_parquet(folder / "05.parquet", {"image": [b"a", b"b"]})
    return folder


def test_slow_files_keep_their_place(folder, tmp_path, monkeypatch):
    expected = list_inputs([str(folder)])
    waits = cycle([0.3, 0.0, 0.2, 0.0, 0.1, 0.0, 0.0])
    real = archive_listing.tar_inputs

    def slow(*arguments, **options):
        time.sleep(next(waits))
        yield from real(*arguments, **options)

    monkeypatch.setattr(archive_listing, "tar_inputs", slow)
    for names in ([str(folder)], [str(folder / "{00..11}.tar"), str(folder / "05.parquet")]):
        listing = list_inputs(names, cache=ListingCache(tmp_path / "cache"))
        assert sorted(ids(listing)) == sorted(ids(expected))
        assert listing.left_out == expected.left_out
        assert len(listing.units) == len(expected.units)
    listing = list_inputs([str(folder)])
    assert listing.inputs.digest() == expected.inputs.digest()
    assert listing.units.tolist() == expected.units.tolist()


def test_as_many_are_listed_at_a_time(folder, monkeypatch):
    barrier = threading.Barrier(sources.NUM_ARCHIVES, timeout=TIMEOUT)
    real = archive_listing.tar_inputs

    def together(*arguments, **options):
        barrier.wait()
        return real(*arguments, **options)

    monkeypatch.setattr(archive_listing, "tar_inputs", together)
    assert sources.NUM_ARCHIVES > 1
    assert len(list_inputs([str(folder / "{00..11}.tar")]).inputs) == sum(number % 5 for number in range(12))


def test_a_source_that_is_missing_ends_what_is_listed(folder, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.tar: cannot be opened"):
        list_inputs([*map(str, sorted(folder.glob("*.tar"))), str(tmp_path / "missing.tar")])
    assert have_ended()


def test_what_cannot_be_reached_is_named_by_its_source(folder, monkeypatch):
    real = archive_listing.tar_inputs

    def unreachable(path, *arguments, **options):
        if os.path.basename(path) == "03.tar":
            raise TimeoutError("no answer")
        return real(path, *arguments, **options)

    monkeypatch.setattr(archive_listing, "tar_inputs", unreachable)
    with pytest.raises(OSError, match=f"{folder}: cannot be reached now: no answer"):
        list_inputs([str(folder)])
    assert have_ended()

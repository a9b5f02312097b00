"""The inputs of tars and Parquet files that were listed before, kept beside a table while these files are the same."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa

from nopad import __version__
from nopad.embedding.inputs.listing import Input, InputList, InputWriter, inputs_in
from nopad.embedding.inputs.reaching import retry
from nopad.embedding.inputs.units import UnitEdge
from nopad.embedding.table.paths import TablePath
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.storage import objects
from nopad.storage.addresses import scheme_of
from nopad.storage.errors import UnreachableStoreError
from nopad.storage.store import Stored

logger = logging.getLogger(__name__)

MIN_SECONDS = 60.0
"""Seconds of listing that a killed command may lose; what takes a sixth of it is kept when it is done."""

_MAX_LOST = 0.02  # of a long listing, so that it has few files
_SETTLED_NS = 2_000_000_000  # of file systems whose times are coarse: a younger file may change once more unseen
_FEW_ROWS = 1 << 12
_SUFFIX = ".parquet"


@dataclass(frozen=True)
class _Entry:
    """Inputs of one file, in a list that was kept.

    Attributes:
        path: of the list.
        start, stop: their places in the list.
        left_out: see `Lister`.
        ends: how many inputs there are before each end of a unit in it.
    """

    path: TablePath
    start: int
    stop: int
    left_out: dict[str, int]
    ends: Sequence[int] = ()


@dataclass
class Lookup:
    """What is known of a file before it is listed.

    Attributes:
        path: or address.
        status: its size and time; `None` where its inputs are not kept.
        key: of its inputs among those that are kept.
        entry: its inputs, if they were kept.
        is_same: whether it has not changed while it was listed, nor lately.
    """

    path: bytes
    status: list[Any] | None
    key: str = ""
    entry: _Entry | None = None
    is_same: bool = False

    def check(self) -> None:
        """Set `is_same`; when all of it was listed."""
        self.is_same = self.status is not None and _status(self.path, None) == self.status and _is_settled(self.status)


class ListingCache:
    """Keeps the inputs of files in lists in a folder, and finds those of files that have the same size and time.

    It is no state of a job: without it, files are listed again.

    Args:
        folder: for its lists; `None` keeps nothing.
    """

    def __init__(self, folder: TablePath | None) -> None:
        parents = (folder, folder.parent) if isinstance(folder, Path) else ()
        self._folder = None if any(path.is_symlink() for path in parents) else folder
        self._entries: dict[str, _Entry] = {}
        self._files: set[TablePath] = set()
        self._used: set[TablePath] = set()
        self._writer: InputWriter | None = None
        self._new: list[list[Any]] = []
        self._open = lru_cache(1)(InputList.load)
        self._began = self._kept = time.monotonic()
        self._load()

    def _load(self) -> None:
        for path in self._lists():
            self._files.add(path)
            try:
                for key, *values in json.loads(InputList.load(path).metadata["files"]):
                    self._entries[key] = _Entry(path, *values)
            except UnreachableStoreError:
                raise
            except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                self._forget(path, error)

    def _forget(self, path: TablePath, error: Exception) -> None:
        """Use a list no more, of which something cannot be read."""
        logger.info("%s is not used, the files in it are listed again: %s", path, error)
        self._used.discard(path)
        self._entries = {key: entry for key, entry in self._entries.items() if entry.path != path}

    def _lists(self) -> list[TablePath]:
        try:
            return [] if self._folder is None else [*self._folder.glob(f"*{_SUFFIX}")]
        except UnreachableStoreError:
            raise
        except OSError:  # which is said where the folder is written to
            return []

    def look_up(self, path: bytes, how: list[Any], stored: Stored | None) -> Lookup:
        """What is known of a file; from any thread.

        Args:
            path: or address.
            how: all that its inputs depend on beside it.
            stored: the object as it was found when its prefix was listed.
        """
        status = None if self._folder is None else _status(path, stored)
        if status is None:
            return Lookup(path, None)
        key = json.dumps([__version__, path.hex(), *how, status])
        return Lookup(path, status, key, self._entries.get(key))

    def inputs(
        self,
        lookup: Lookup,
        left_out: Counter[str],
        listed: Callable[[Lookup], Iterator[Input | UnitEdge]],
        items: Iterator[Any],
    ) -> Iterator[Input | pa.Table | UnitEdge]:
        """The inputs of a file: those that were kept, as Arrow tables, else those that are listed now; and the ends of
        units in it.

        Args:
            left_out: what was left out is added.
            listed: lists it again, adds to `left_out`, and checks the lookup at the end.
            items: these, where none were kept.
        """
        if lookup.status is None:
            yield from items
            return
        num_taken = 0
        if (entry := lookup.entry) is not None:
            try:
                for table in self._tables(entry):
                    if isinstance(table, UnitEdge):
                        yield table
                        continue
                    num_taken += len(table)
                    # A slice has the dictionaries of its whole block, which many short ones would multiply.
                    yield from inputs_in(table) if len(table) < _FEW_ROWS else (table,)
                if num_taken != entry.stop - entry.start:
                    raise ValueError(f"expected inputs {entry.start} to {entry.stop}, got {num_taken:,}")
                left_out.update(entry.left_out)
            except UnreachableStoreError:
                raise
            except (pa.ArrowException, OSError, ValueError, TypeError) as error:  # removed by another command, perhaps
                self._forget(entry.path, error)
                items = listed(lookup)
            else:
                self._used.add(entry.path)
                return
        self._writer = self._writer or InputWriter()
        start = self._writer.num_inputs
        ends: list[int] = []
        is_whole = True
        for item in items:
            place = self._writer.num_inputs - start
            if isinstance(item, UnitEdge):
                ends.append(place)
            else:
                is_whole = is_whole and item.kind != "broken"
                self._writer.add(item)
            if place >= num_taken:
                yield item
        if is_whole and lookup.is_same:
            self._new.append([lookup.key, start, self._writer.num_inputs, dict(left_out), ends])
        now = time.monotonic()
        if now - self._kept >= max(MIN_SECONDS, _MAX_LOST * (now - self._began)):
            self.keep()

    def _tables(self, entry: _Entry) -> Iterator[pa.Table | UnitEdge]:
        """The kept inputs of a file, and the ends of units in it.

        Raises:
            OSError, ValueError, TypeError: they are damaged.
        """
        places = [entry.start, *(entry.start + end for end in entry.ends), entry.stop]
        inputs = self._open(entry.path)
        for number, (start, stop) in enumerate(pairwise(places)):
            if number:
                yield UnitEdge.END
            if not start <= stop:
                raise ValueError(f"expected ends of units in their order, got {start} and {stop}")
            yield from inputs.tables(start, stop)

    def __enter__(self) -> ListingCache:
        return self

    def __exit__(self, *_: object) -> None:
        """All is listed, or listing has failed: what took long is kept in both cases."""
        if time.monotonic() - self._kept >= MIN_SECONDS / 6:
            self.keep()
        elif self._writer is not None:
            self._writer.close()
            self._writer = None

    @property
    def num_files(self) -> int:
        """Of how many files the inputs are kept."""
        return len(self._entries)

    def keep(self) -> None:
        """Write what was listed since the last time; a folder that cannot be written is no error."""
        writer, new = self._writer, self._new
        self._writer, self._new, self._kept = None, [], time.monotonic()
        if writer is None or self._folder is None:
            return
        if not new:
            writer.close()
            return
        try:
            if isinstance(self._folder, Path):
                self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{uuid.uuid4().hex}{_SUFFIX}"
            writer.finish({"files": json.dumps(new)}).save(path)
        except UnreachableStoreError:
            raise
        except OSError as error:
            logger.warning("%s: what was listed is not kept: %s", self._folder, error)

    def clean(self) -> None:
        """Remove lists that were of no use; not while other commands may use them."""
        for path in self._files - self._used:
            with suppress(OSError):
                path.unlink()


def _status(path: bytes, stored: Stored | None) -> list[Any] | None:
    """Size and time of a file or an object, of one that has a version this; `None` where they cannot be read."""
    try:
        if not scheme_of(path):
            status = os.stat(path)
            return [status.st_size, [status.st_mtime_ns, status.st_ctime_ns], None]  # utime does not set the second
        stored = stored or retry(lambda: objects.stat(path, INPUT_TIMEOUT_SECONDS))
        if (e_tag := stored.version.e_tag) is not None:  # times are coarser here than in the listing of a prefix
            return [stored.size, [], e_tag.strip('"')]
        return [stored.size, [stored.mtime_ns], None] if stored.mtime_ns else None
    except (OSError, ValueError):  # which is said where it is listed
        return None


def _is_settled(status: list[Any]) -> bool:
    _, times, _ = status
    return all(time.time_ns() - each > _SETTLED_NS for each in times)

"""Tars that are listed as one input each, and whose images are found while their shard is made."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from nopad.counts import counted
from nopad.embedding.inputs.ahead import Ahead
from nopad.embedding.inputs.archives import COMPRESSED, CompressedTarError, is_compressed, tar_inputs
from nopad.embedding.inputs.listing import Input, InputList, root_of
from nopad.embedding.inputs.names import HIDDEN, as_text
from nopad.embedding.inputs.reaching import UnreachableSourceError, location_of, name_of, retry
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.storage import objects
from nopad.storage.addresses import scheme_of
from nopad.storage.errors import UnusableStoreError
from nopad.storage.store import Stored

WHOLE_TAR = "whole tar"
"""The kind of such an input."""

MIN_BYTES, MAX_BYTES = 8 << 20, 2 << 30
"""Bytes of such a tar: listing a smaller one takes a request or two, and a larger one is work for several actors."""

IMAGE_BYTES = 1 << 17
"""For so many bytes of a tar an image is expected, where shards end by the number of images."""

_SECOND_NS = 1_000_000_000
_BATCH, _MAX_BATCHES = 4, 2  # members that are found before they are read: of objects, what is between is in memory


def whole_tar(path: str, source: str, stored: Stored | None, *, hidden: bool) -> Input | None:
    """The input that stands for all images of a tar, with its size and, as `offset`, its time; `None` where its
    members are listed.

    Args:
        path: or an address.
        stored: the object as it was found when its prefix was listed.
        hidden: take members that are hidden, too.
    """
    location = location_of(path)
    try:
        if scheme_of(path):
            stored = stored or retry(lambda: objects.stat(location, INPUT_TIMEOUT_SECONDS))
            size, mtime_ns = stored.size, stored.mtime_ns // _SECOND_NS * _SECOND_NS  # as finely as any request says
        else:
            status = os.stat(path)
            size, mtime_ns = status.st_size, status.st_mtime_ns
        if not MIN_BYTES <= size <= MAX_BYTES or (not scheme_of(path) and is_compressed(location)):
            return None
    except (OSError, ValueError):  # which is said where it is listed
        return None
    note = HIDDEN if hidden else ""
    return Input(as_text(os.path.basename(path)), as_text(source), WHOLE_TAR, location, mtime_ns, size, note)


def without_time(item: Input) -> Input:
    """An input without a whole tar's time, which may be another one for the same bytes."""
    return replace(item, offset=0) if item.kind == WHOLE_TAR else item


def is_same(item: Input, timeout: float | None) -> bool:
    """Whether an input is no whole tar, or one of the size that it had when it was listed; as far as is known, where it
    cannot be read."""
    from nopad.embedding.inputs.media import file_size  # imports torch, before which actors start
    from nopad.preprocessing.decode import ImageError
    from nopad.preprocessing.files import FileRange

    try:
        return item.kind != WHOLE_TAR or file_size(FileRange(item.path, timeout=timeout)) == item.size
    except ImageError:
        return True


def members(item: Input, timeout: float | None) -> Iterator[Input]:
    """The images of a whole tar, see `tar_inputs`; where it cannot be read, is another one now or has none, a
    `"broken"` input that says so.

    Args:
        timeout: see `open_source`.

    Raises:
        UnreachableError, UnreachableSourceError, UnusableStoreError: it cannot be reached.
    """
    from nopad.embedding.inputs.media import file_size  # imports torch, before which actors start
    from nopad.preprocessing.decode import ImageError, UnreachableError
    from nopad.preprocessing.files import FileRange

    try:
        size = file_size(FileRange(item.path, root=root_of(item), timeout=timeout))
    except UnreachableError as error:
        raise type(error)(item.source, error.reason) from error
    except ImageError as error:
        yield _broken(item, error.reason)
        return
    if size != item.size:
        reason = f"it has {size:,} bytes, and had {item.size:,} when it was listed"
        yield _broken(item, f"{reason}; --update takes it as it is now")
        return
    left_out = Counter[str]()
    is_empty = True
    try:
        hidden = item.note == HIDDEN
        for member in tar_inputs(name_of(item.path), item.source, left_out, hidden=hidden, timeout=timeout):
            is_empty = False
            yield member
    except CompressedTarError:
        yield _broken(item, COMPRESSED)
        return
    if is_empty:
        counts = ", ".join(f"{number:,} {kind or 'without suffix'}" for kind, number in left_out.items())
        yield _broken(item, f"no image in it; left out: {counts or 'nothing'}")


def _broken(item: Input, reason: str) -> Input:
    return replace(item, kind="broken", offset=0, size=0, note=as_text(reason))


@dataclass
class Found:
    """What was found in whole tars so far.

    Attributes:
        images: how many.
        bytes: of the tars, as far as they were read.
    """

    images: int = 0
    bytes: int = 0


def expanded(
    items: Iterable[Input], timeout: float | None, found: Found | None = None, *, unreachable_rows: bool = False
) -> Generator[Input, None, None]:
    """Inputs, and in the place of each whole tar its images, a few of which are found ahead by a thread.

    Args:
        found: counts them.
        unreachable_rows: where a tar cannot be reached, a `"broken"` input says so.

    Raises:
        See `members`.
    """
    from nopad.preprocessing.decode import UnreachableError  # imports torch

    found = Found() if found is None else found
    for item in items:
        if item.kind != WHOLE_TAR:
            yield item
            continue
        try:
            yield from _counted(item, timeout, found)
        except (UnreachableError, UnreachableSourceError, UnusableStoreError) as error:
            if not unreachable_rows:
                raise
            reason = error.reason if isinstance(error, UnreachableError) else f"unreachable: {error}"
            yield _broken(item, reason)


def _counted(item: Input, timeout: float | None, found: Found) -> Iterator[Input]:
    position = 0
    with closing(Ahead(members(item, timeout), _BATCH, _MAX_BATCHES)) as ahead:
        for member in ahead:
            end = max(position, member.offset + member.size)  # hard links lead back
            found.bytes += end - position
            found.images += 1
            position = end
            yield member
    found.bytes += item.size - position


@dataclass(frozen=True)
class WholeTars:
    """Which inputs of a list are whole tars.

    Attributes:
        places: in the list, increasing.
        sizes: their bytes.
    """

    places: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(cls, inputs: InputList) -> WholeTars:
        """Those of a list, which is read."""
        found, first = WholeTarWriter(), 0
        for table in inputs.tables():
            for place in np.flatnonzero(table["kind"].cast(pa.string()).to_numpy() == WHOLE_TAR).tolist():
                found.add(first + place, table["size"][place].as_py())
            first += len(table)
        return found.finish()

    def __len__(self) -> int:
        return len(self.places)

    def within(self, places: range) -> WholeTars:
        """Those at some places of the list."""
        start, stop = np.searchsorted(self.places, (places.start, places.stop))
        return WholeTars(self.places[start:stop], self.sizes[start:stop])

    def among(self, chosen: np.ndarray) -> WholeTars:
        """Those of a list that has the inputs at chosen places of this one."""
        kept = np.isin(self.places, chosen)
        return WholeTars(np.searchsorted(chosen, self.places[kept]), self.sizes[kept])

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return int(self.sizes.sum())

    def num_images(self, num_inputs: int) -> int:
        """How many images a list is expected to have, of so many inputs with these."""
        return num_inputs + int((_images(self.sizes) - 1).sum())

    def describe(self) -> str:
        """How many they are, and their bytes, in words."""
        return tars_in_words(len(self), self.num_bytes)


NO_TARS = WholeTars()


def tars_in_words(number: int, num_bytes: int) -> str:
    """So many tars of so many bytes."""
    return f"{counted(number, 'tar')} of {num_bytes / 1e9:,.2f} GB"


class WholeTarWriter:
    """Collects the whole tars of a list."""

    def __init__(self) -> None:
        self._places, self._sizes = array("q"), array("q")

    def add(self, place: int, size: int) -> None:
        """Note one by its place in the list."""
        self._places.append(place)
        self._sizes.append(size)

    def finish(self) -> WholeTars:
        """All of them."""
        return WholeTars(np.array(self._places, np.int64), np.array(self._sizes, np.int64))


class ExpectedImages:
    """How many images inputs are expected to have: whole tars by their bytes, all others one."""

    def __init__(self, tars: WholeTars) -> None:
        self._places = tars.places
        self._more = np.concatenate([[0], np.cumsum(_images(tars.sizes) - 1)])

    def between(self, first: int, end: int) -> int:
        """Those of the inputs from `first` to the one before `end`."""
        if not len(self._places):
            return end - first
        before, after = np.searchsorted(self._places, (first, end))
        return end - first + int(self._more[after] - self._more[before])


def _images(sizes: np.ndarray) -> np.ndarray:
    return np.maximum(1, sizes // IMAGE_BYTES)

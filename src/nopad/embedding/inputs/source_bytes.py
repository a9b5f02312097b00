"""How many bytes of the sources the inputs of a list have, by which shards of large images end early."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from nopad.embedding.inputs.listing import BLOCK, InputList
from nopad.embedding.inputs.temporary import writing_temporary
from nopad.embedding.inputs.whole_tars import WHOLE_TAR

if TYPE_CHECKING:  # it imports torch, before which actors start
    from nopad.embedding.inputs.stamps import StampSpool

_WIDTH = 8  # bytes of a sum in the file


class SourceBytes:
    """Bytes of the sources from one input of a list to another, in a temporary file with a sum for each input.

    A tar's member and a whole tar have their own; those of any other file are divided evenly among the inputs in it.
    Where a size is not known, it is 0.

    Args:
        sizes: of the inputs, in parts.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, sizes: Iterable[np.ndarray]) -> None:
        total = 0
        with writing_temporary("the sizes of inputs"):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
            self._file.write(bytes(_WIDTH))
            for part in sizes:
                sums = total + np.cumsum(part, dtype=np.int64)
                total = int(sums[-1]) if len(sums) else total
                self._file.write(sums.tobytes())
            self._file.flush()

    @classmethod
    def of(cls, inputs: InputList, stamps: StampSpool) -> SourceBytes:
        """Those of inputs by the stamps of their files."""
        return cls(_sizes(zip(inputs.tables(), stamps.tables(), strict=True)))

    def between(self, first: int, end: int) -> int:
        """Bytes of the inputs from `first` to the one before `end`."""
        before, after = (int(self._sums(place, place + 1)[0]) for place in (first, end))
        return after - before

    def fitting(self, first: int, end: int, limit: int) -> int:
        """The last place up to which inputs from `first` on have at most `limit` bytes; behind one input at least, and
        not behind `end`."""
        sums = self._sums(first, end + 1)
        return first + max(1, int(np.searchsorted(sums, sums[0] + limit, side="right")) - 1)

    def _sums(self, first: int, end: int) -> np.ndarray:
        data = os.pread(self._file.fileno(), _WIDTH * (end - first), _WIDTH * first)
        return np.frombuffer(data, np.int64)


def _sizes(tables: Iterable[tuple[pa.Table, pa.Table]]) -> Iterator[np.ndarray]:
    """The bytes of inputs by the tables of inputs and of their stamps."""
    path, size, count = b"", 0, 0  # of the file in hand, which may go on in the next table
    for table, stamps in tables:
        paths = table.unify_dictionaries()["path"].combine_chunks()
        is_member = np.isin(table["kind"].cast(pa.string()).to_numpy(), ("tar", WHOLE_TAR))
        sizes = np.where(is_member, table["size"].to_numpy(), np.maximum(stamps["size"].to_numpy(), 0))
        starts = np.flatnonzero((np.diff(paths.indices.to_numpy(), prepend=-1) != 0) | is_member)
        counts = np.diff(starts, append=len(table))
        if count and not is_member[0] and paths[0].as_py() == path:
            count += int(counts[0])
            starts, counts = starts[1:], counts[1:]
        if not len(starts):
            continue
        yield from _shares(size, count)
        for number in range(0, len(starts) - 1, BLOCK):
            part = slice(number, min(number + BLOCK, len(starts) - 1))
            yield _divided(sizes[starts[part]], counts[part])
        path, size, count = paths[int(starts[-1])].as_py(), int(sizes[starts[-1]]), int(counts[-1])
    yield from _shares(size, count)


def _divided(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.repeat(sizes // counts, counts)


def _shares(size: int, count: int) -> Iterator[np.ndarray]:
    for first in range(0, count, BLOCK):
        yield np.full(min(BLOCK, count - first), size // count)

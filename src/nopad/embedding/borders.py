"""Which inputs each shard has: where one shard ends and the next begins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.counts import counted
from nopad.embedding import shard_sizes
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.whole_tars import NO_TARS, ExpectedImages, WholeTars
from nopad.embedding.table.paths import TablePath, open_whole, write_whole

TARS = "tars"
"""The entry of a job's record that says that tars are listed as a whole."""

_SCHEMA = pa.schema({"end": pa.int64()})


class Borders:
    """The shards of a job, by the ends of their inputs in its list.

    Args:
        ends: for each shard the place behind its last input, increasing.
    """

    def __init__(self, ends: np.ndarray) -> None:
        self._ends = ends

    @classmethod
    def every(cls, rows: int, num_inputs: int) -> Borders:
        """Shards of so many rows; the last has the rest."""
        return cls(np.minimum(np.arange(rows, num_inputs + rows, rows), num_inputs))

    @classmethod
    def at_units(
        cls,
        units: np.ndarray,
        rows: tuple[int, int],
        num_inputs: int,
        sizes: SourceBytes | None = None,
        whole_tars: WholeTars = NO_TARS,
    ) -> Borders:
        """Shards of whole units, which are tars and row groups of Parquet files.

        Units are joined until a shard has `rows[0]` inputs. One that makes it longer than `rows[1]` is divided evenly,
        into shards of at most `rows[0]`, and so are inputs that are in no unit; a shard that is half full ends before
        such a unit.

        With `sizes` units are joined until there are that many inputs or `shard_sizes.MIN_BYTES`, and what has more
        than `shard_sizes.MAX_BYTES` is divided as well. Where that makes more than `shard_sizes.ENOUGH_FILES` shards,
        and more than rows alone, both are doubled.

        Args:
            units: `(N, 2)`: the first input of each, and the one behind the last; in order.
            sizes: of the inputs.
            whole_tars: those of the inputs that count as more than one.
        """
        images = ExpectedImages(whole_tars)
        borders = cls(np.fromiter(_Ends(rows, num_inputs, images).of(units), np.int64))
        if sizes is None:
            return borders
        max_files = max(len(borders), shard_sizes.ENOUGH_FILES)
        limits = ((shard_sizes.MIN_BYTES << doubled, shard_sizes.MAX_BYTES << doubled) for doubled in count())
        every = (np.fromiter(_Ends(rows, num_inputs, images, sizes, each).of(units), np.int64) for each in limits)
        return cls(next(ends for ends in every if len(ends) <= max_files))

    def __len__(self) -> int:
        return len(self._ends)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Borders) and np.array_equal(self._ends, other._ends)

    def __getitem__(self, shard: int) -> range:
        """The places of a shard's inputs in the list.

        Raises:
            IndexError: a job without this shard.
        """
        if not 0 <= shard < len(self):
            raise IndexError(f"shard {shard} of {len(self)}")
        return range(int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard]))

    def __iter__(self) -> Iterator[range]:
        return map(self.__getitem__, range(len(self)))

    def digest(self) -> str:
        """The SHA-256 in hex of all ends."""
        return hashlib.sha256(self._ends.astype("<i8").tobytes()).hexdigest()

    def save(self, path: TablePath, *, check: Callable[[], None]) -> None:
        """Write them as a Parquet file, all of it or nothing; `check` as in `write_whole`."""
        with write_whole(path, check=check) as file:
            pq.write_table(pa.table([pa.array(self._ends)], _SCHEMA), file, compression="zstd")

    @classmethod
    def load(cls, path: TablePath) -> Borders:
        """Read what `save` wrote.

        Raises:
            OSError, ValueError: a file that is missing, damaged or something else.
        """
        with open_whole(path) as file:
            table = pq.read_table(file, use_threads=False, pre_buffer=False)
        if table.schema.remove_metadata() != _SCHEMA or table["end"].null_count:
            raise ValueError(f"{path}: expected the column\n{_SCHEMA}\ngot\n{table.schema}")
        return cls(table["end"].to_numpy())


def regular_borders(record: Mapping[str, str], num_inputs: int) -> Borders:
    """The shards of a job whose record names no others."""
    return Borders.every(int(record["shard_size"].partition("..")[0]), num_inputs)


def with_borders(
    record: Mapping[str, str], borders: Borders, num_inputs: int, whole_tars: WholeTars = NO_TARS
) -> dict[str, str]:
    """The record of a job with these shards: `"shards"` is their digest, unless they are `regular_borders`."""
    is_regular = borders == regular_borders(record, num_inputs)
    tars = {TARS: "whole"} if whole_tars else {}
    return {**record, **tars} if is_regular else {**record, **tars, "shards": borders.digest()}


class _Ends:
    """Where shards end.

    Args:
        rows: see `Borders.at_units`.
        images: those of the inputs.
        sizes: of the inputs, `None` where they do not matter.
        num_bytes: up to which units are joined, and above which one is divided.
    """

    def __init__(
        self,
        rows: tuple[int, int],
        num_inputs: int,
        images: ExpectedImages,
        sizes: SourceBytes | None = None,
        num_bytes: tuple[int, int] = (0, 0),
    ) -> None:
        self._rows, self._max_rows = rows
        self._num_inputs = num_inputs
        self._images = images
        self._sizes = sizes
        self._bytes, self._max_bytes = num_bytes

    def of(self, units: np.ndarray) -> Iterator[int]:
        """The ends, by the units."""
        start = 0  # of the shard in hand
        for first, end in (*units.tolist(), (self._num_inputs, self._num_inputs)):
            while self._images.between(start, first) >= self._rows or self._num_parts(start, first, self._max_rows) > 1:
                start = self._page_end(start, min(start + self._rows, first))
                yield start
            parts = self._num_parts(start, end, self._max_rows)
            if parts > 1 and self._is_full(start, first, share=2):
                start = first
                yield start
                parts = self._num_parts(start, end, self._max_rows)
            if parts > 1:
                yield from (start + (end - start) * part // parts for part in range(1, parts + 1))
                start = end
            elif self._is_full(start, end):
                start = end
                yield start
        if start < self._num_inputs:
            yield self._num_inputs

    def _is_full(self, start: int, end: int, share: int = 1) -> bool:
        """Whether there are as many inputs as units are joined to, or one over `share` of these."""
        if start == end:
            return False
        has_rows = share * self._images.between(start, end) >= self._rows
        return has_rows or (self._sizes is not None and share * self._sizes.between(start, end) >= self._bytes)

    def _num_parts(self, start: int, end: int, max_rows: int) -> int:
        """Of how many shards what is too much for one is divided into."""
        number, images = end - start, self._images.between(start, end)
        by_rows = -(-images // self._rows) if images > max_rows else 1
        by_bytes = -(-self._sizes.between(start, end) // self._max_bytes) if self._sizes is not None else 1
        return min(max(by_rows, by_bytes), number)

    def _page_end(self, start: int, end: int) -> int:
        """Of inputs that are in no unit the end of a shard."""
        return end if self._sizes is None else self._sizes.fitting(start, end, self._max_bytes)


def too_many_files(borders: Borders, units: np.ndarray, num_inputs: int, whole_tars: WholeTars = NO_TARS) -> str:
    """What to change where a table would have more than `shard_sizes.MAX_FILES` files; empty where it has not."""
    if (files := len(borders)) <= shard_sizes.MAX_FILES:
        return ""
    size = -(-whole_tars.num_images(num_inputs) // shard_sizes.MAX_FILES)
    rest = num_inputs, None, whole_tars
    while (fewer := len(Borders.at_units(units, (size, size), *rest))) > shard_sizes.MAX_FILES:
        size += -(-size // 10)
    return (
        f"{files:,} files in one folder: --shard-size {size} makes {counted(fewer, 'file')}, or split "
        f"the sources into several tables, which are read as one"
    )


def too_many_with_update(num_files: int) -> str:
    """What to do where an update takes a table over `shard_sizes.MAX_FILES` files; empty where it does not.

    Args:
        num_files: of the table and its update.
    """
    if num_files <= shard_sizes.MAX_FILES:
        return ""
    return (
        f"{num_files:,} files in one folder with this update: embed what is new into a table of its own (another "
        f"--out, without --update); several tables are read as one"
    )

"""Columns of tables, by row: a few blocks at a time, whatever the size of the file."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.inputs.arrow_stream import ArrowStream
from nopad.embedding.inputs.fetched import table_size
from nopad.embedding.inputs.saved_datasets import files_of
from nopad.embedding.inputs.tables import ARROW_DAMAGE, open_parquet
from nopad.preprocessing.files import why
from nopad.preprocessing.reachable import is_unreachable

_BLOCK_BYTES = 32 << 20
_MAX_BLOCKS = 3


OnRead = Callable[[int, int], None]
"""Called before rows are read in one go, with the first of them and the first behind them, or with twice the same."""


class Column(Protocol):
    """Values of one column by row; not to be read from two threads at once."""

    def is_loaded(self, row: int) -> bool:
        """Whether the value of a row is there without reading."""
        ...

    def value(self, row: int) -> pa.Array:
        """The value of a row, as an array of one.

        Raises:
            One of `ARROW_DAMAGE`.
        """
        ...

    def close(self) -> None: ...


class DatasetColumn:
    """A column of one split of a saved dataset."""

    def __init__(self, folder: bytes, split: str, column: str, on_read: OnRead = lambda *_: None) -> None:
        self._streams: list[ArrowStream] = []
        for path in files_of(folder, split):
            on_read(0, 0)
            self._streams.append(ArrowStream(path))
        self._starts = list(accumulate((len(stream) for stream in self._streams), initial=0))
        self._column = column
        self._on_read = on_read
        self._start = 0
        self._block: pa.Array | None = None
        self._damage: dict[int, str] = {}  # by the first row of a batch that cannot be read

    def close(self) -> None:
        self._block = None

    def is_loaded(self, row: int) -> bool:
        return self._block is not None and self._start <= row < self._start + len(self._block)

    def value(self, row: int) -> pa.Array:
        if not self.is_loaded(row):
            self._load(row)
        assert self._block is not None
        return self._block.slice(row - self._start, 1)

    def _load(self, row: int) -> None:
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        number = bisect.bisect_right(self._starts, row) - 1
        stream, before = self._streams[number], self._starts[number]
        start, stop = stream.rows_of_batch(row - before)
        self._block, self._start = None, before + start  # not two blocks at a time
        if self._start in self._damage:
            raise ValueError(self._damage[self._start])
        self._on_read(self._start, before + stop)
        try:
            block = stream.batch_of(row - before)[1].column(self._column)
            block.validate(full=True)  # Arrow trusts the offsets in a batch
        except ARROW_DAMAGE as error:
            if not is_unreachable(error):
                self._damage[self._start] = why(error)
            raise
        self._block = block


class ParquetColumn:
    """Values of one column of a Parquet file.

    A block is a row group, or of a large one a part that holds about 32 MiB: files often have one row group of many
    gigabytes. A row group is read forwards; a row before the kept blocks starts it again. Behind damage it is not tried
    again.
    """

    def __init__(self, path: bytes, column: str, on_read: OnRead = lambda *_: None) -> None:
        self._file = open_parquet(path)
        self._column = column
        self._on_read = on_read
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        self._starts = list(accumulate((group.num_rows for group in groups), initial=0))
        sizes = [chunk.total_compressed_size for group in range(len(groups)) for chunk in self._chunks(group)]
        if min(sizes, default=0) < 0 or sum(sizes) > table_size(path):
            self.close()
            raise ValueError(f"its column claims {sum(sizes)} bytes, the file has {table_size(path)}")
        if max(sizes, default=0) <= _MAX_BLOCKS * _BLOCK_BYTES:
            self.close()
            self._file = open_parquet(path, in_pages=False)
        self._blocks: OrderedDict[int, pa.Array] = OrderedDict()
        self._batches = iter(())
        self._group, self._next = -1, 0
        self._damage: dict[int, tuple[int, str]] = {}  # by row group: the first row that cannot be read, and why

    def close(self) -> None:
        self._file.close(force=True)

    def is_loaded(self, row: int) -> bool:
        return any(start <= row < start + len(block) for start, block in self._blocks.items())

    def value(self, row: int) -> pa.Array:
        for start, block in self._blocks.items():
            if start <= row < start + len(block):
                self._blocks.move_to_end(start)
                return block.slice(row - start, 1)
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of {self._starts[-1]}")
        group = bisect.bisect_right(self._starts, row) - 1
        damaged_from, reason = self._damage.get(group, (row + 1, ""))
        if row >= damaged_from:
            raise ValueError(reason)
        if group != self._group or row < self._next:
            self._batches = self._file.iter_batches(
                batch_size=self._block_rows(group), row_groups=[group], columns=[self._column], use_threads=False
            )
            self._group, self._next = group, self._starts[group]
        try:
            return self._forward(row)
        except ARROW_DAMAGE as error:
            self._group = -1
            if not is_unreachable(error):
                self._damage[group] = self._next, why(error)
            raise

    def _forward(self, row: int) -> pa.Array:
        while True:
            self._on_read(self._next, self._starts[self._group + 1])
            if (batch := next(self._batches, None)) is None:
                raise ValueError(f"row group {self._group} ends before row {row}")
            start = self._next
            if row < start + len(batch):
                self._blocks[start] = batch.column(self._column)
                if len(self._blocks) > _MAX_BLOCKS:
                    self._blocks.popitem(last=False)
            self._next += len(batch)
            if row < self._next:
                return self._blocks[start].slice(row - start, 1)

    def _chunks(self, group: int) -> list[pq.ColumnChunkMetaData]:
        """The chunks of this column, several for a struct."""
        metadata = self._file.metadata.row_group(group)
        chunks = (metadata.column(i) for i in range(metadata.num_columns))
        return [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{self._column}.")]

    def _block_rows(self, group: int) -> int:
        size = sum(chunk.total_uncompressed_size for chunk in self._chunks(group))
        return max(1, self._file.metadata.row_group(group).num_rows * _BLOCK_BYTES // max(size, _BLOCK_BYTES))

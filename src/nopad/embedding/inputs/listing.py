"""The list of a job's inputs, one row per image or video."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.inputs.temporary import writing_temporary
from nopad.embedding.table.paths import TablePath, open_parts, write_whole

BLOCK = 1 << 16
"""Inputs that are read and written at a time; with another number, digests are others."""

_BATCH = 1 << 12  # that are Python objects at a time
_NUM_BLOCKS = 2  # in memory: a shard may begin in one and end in the next
_COPY_BYTES = 1 << 20
_LIST = "the list of inputs"
_FEW = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": _FEW,
        "kind": _FEW,
        "path": pa.dictionary(pa.int32(), pa.binary()),
        "offset": pa.int64(),
        "size": pa.int64(),
        "note": _FEW,
    }
)
_PLAIN_SCHEMA = pa.schema(
    [(field.name, getattr(field.type, "value_type", field.type)) for field in _SCHEMA]  # pyright: ignore
)


@dataclass(frozen=True, slots=True)
class Input:
    """The place of one image or video.

    Attributes:
        id: its name within `source`: relative path, name in the tar, line of the list file; the row number in Parquet
            and datasets, `split/row` where there are splits. Always valid UTF-8: other bytes are written `\\xff`.
        source: the folder, glob or list file as it was given, or the tar, Parquet file or dataset.
        kind: `"image"`, `"video"`, `"tar"`, `"parquet"`, `"dataset"`, or `"broken"` for what could not be listed; see
            `whole_tars` for others.
        path: the absolute path to read, as the file system's bytes, or an address in UTF-8.
        offset: byte of a tar member's data, row of a Parquet file or dataset, else 0.
        size: bytes of a tar member, else 0.
        note: the column for Parquet, `split/column` for a dataset (`/column` without splits), the reason for
            `"broken"`, else empty.
    """

    id: str
    source: str
    kind: str
    path: bytes
    offset: int = 0
    size: int = 0
    note: str = ""


def root_of(item: Input) -> bytes:
    """The folder in which an input's file was listed, of a tar or table its own; empty where none is known."""
    if item.kind not in ("image", "video"):
        return os.path.dirname(item.path)
    id = (item.id.rpartition("#")[0] if item.note else item.id).encode()  # UTF-8 in any locale, see `as_text`
    return item.path.removesuffix(b"/" + id) if item.path.endswith(b"/" + id) else b""


class InputList:
    """Inputs in order, in a Parquet file of which a block is read at a time: a few MB in memory, however many they are.

    Args:
        file: as `InputWriter` writes it; read as long as the list is used, from any thread.

    Raises:
        OSError, ValueError: a file that is damaged or something else.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file
        # Not pre-buffered, and in no other thread: what Arrow's own threads have read through Python they let go of
        # when Python may have ended already.
        self._parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        schema = self._parquet.schema_arrow.remove_metadata()
        if schema != _SCHEMA:
            raise ValueError(f"inputs: expected the columns\n{_SCHEMA}\ngot\n{schema}")
        metadata = self._parquet.metadata
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if metadata.num_rows != sum(rows) or any(number < 0 for number in rows):
            raise ValueError(f"inputs: its footer says {metadata.num_rows} rows, its parts {sum(rows)}; damaged")
        self._ends = [*accumulate(rows)]
        self._lock = threading.Lock()
        self._blocks: dict[int, pa.Table] = {}

    @classmethod
    def of(cls, items: Iterable[Input]) -> InputList:
        """Collect inputs, in a temporary file."""
        with InputWriter() as writer:
            for item in items:
                writer.add(item)
            return writer.finish()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Input: ...
    @overload
    def __getitem__(self, index: slice) -> list[Input]: ...
    def __getitem__(self, index: int | slice) -> Input | list[Input]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            return [item for table in self.tables(start, stop) for item in inputs_in(table)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"input {index} of {len(self)}")
        index %= len(self)
        return self[index : index + 1][0]

    def __iter__(self) -> Iterator[Input]:
        for table in self.tables():
            yield from inputs_in(table)

    def tables(self, start: int = 0, stop: int | None = None) -> Iterator[pa.Table]:
        """The inputs from one place to another as Arrow tables, one for each block."""
        stop = len(self) if stop is None else stop
        for block in range(bisect_right(self._ends, start), len(self._ends)):
            first = self._ends[block - 1] if block else 0
            if max(first, start) >= stop:
                return
            with self._lock:
                table = self._block(block)
            begin = max(start - first, 0)
            yield table.slice(begin, min(stop, self._ends[block]) - first - begin)

    def _block(self, block: int) -> pa.Table:
        if (table := self._blocks.get(block)) is not None:
            return table
        table = self._parquet.read_row_group(block, use_threads=False)
        if len(table) != self._ends[block] - (self._ends[block - 1] if block else 0) or any(
            column.null_count for column in table.columns
        ):
            raise ValueError(f"inputs: block {block} of its file is damaged")
        while len(self._blocks) >= _NUM_BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        self._blocks[block] = table
        return table

    @property
    def metadata(self) -> dict[str, str]:
        """The texts beside the inputs in the file."""
        entries = self._parquet.metadata.metadata or {}
        return {name.decode(): text.decode() for name, text in entries.items()}

    def digest(self) -> str:
        """The SHA-256 in hex of all fields in order, the same however the file is cut into blocks."""
        sha = hashlib.sha256(str(len(self)).encode())
        for table in in_blocks(self.tables()):
            for column in table.columns:
                if pa.types.is_integer(column.type):
                    sha.update(column.to_numpy().astype("<i8").tobytes())
                else:
                    data = column.cast(pa.large_binary()).combine_chunks()
                    offsets = np.frombuffer(data.buffers()[1], "<i8", len(data) + 1, 8 * data.offset)
                    sha.update(np.diff(offsets).tobytes())
                    sha.update(memoryview(data.buffers()[2] or b"")[offsets[0] : offsets[-1]])
        return sha.hexdigest()

    def save(self, path: TablePath, *, check: Callable[[], None] = lambda: None) -> None:
        """Write the list as a Parquet file, all of it or nothing; `check` as in `write_whole`."""
        with self._lock, write_whole(path, check=check) as file:
            self._file.seek(0)
            while data := self._file.read(_COPY_BYTES):
                file.write(data)

    @classmethod
    def load(cls, path: TablePath) -> InputList:
        """Open what `save` wrote.

        Raises:
            OSError, ValueError: a file that is missing, damaged or something else.
        """
        return cls(open_parts(path))


class InputWriter:
    """Writes inputs into a temporary file, block after block; ending the context early removes what was written.

    Raises:
        OSError: by all methods, the file cannot be written.
    """

    def __init__(self) -> None:
        with writing_temporary(_LIST):
            self._file: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit, or the list's
            self._writer: Any = pq.ParquetWriter(self._file, _SCHEMA, compression="zstd", write_page_checksum=True)
        self._items: list[Input] = []
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        self.num_inputs = 0
        """How many were added."""

    def __enter__(self) -> InputWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was written, unless it is finished."""
        if self._writer is not None:
            with suppress(OSError):
                self._file.close()  # first: what Arrow holds back is of no use
            with suppress(OSError, ValueError):
                self._writer.close()
            self._writer = None

    def add(self, item: Input) -> None:
        """Add an input behind the others."""
        self._items.append(item)
        self.num_inputs += 1
        if len(self._items) >= _BATCH:
            self._take_items()

    def add_table(self, table: pa.Table) -> None:
        """Add inputs as `InputList.tables` returns them."""
        self._take_items()
        self.num_inputs += len(table)
        self._wait(table)

    def finish(self, metadata: Mapping[str, str] | None = None) -> InputList:
        """The list of all that were added, see `InputList.metadata`."""
        self._take_items()
        with writing_temporary(_LIST):
            while self._num_waiting:
                self._write()
            self._writer.add_key_value_metadata(dict(metadata or {}))
            self._writer.close()
            self._file.seek(0)  # writes what is held back
        self._writer = None
        return InputList(pa.PythonFile(self._file, "r"))

    def _take_items(self) -> None:
        if self._items:
            self._wait(table_of(self._items))
            self._items = []

    def _wait(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._num_waiting += len(table)
        while self._num_waiting >= BLOCK:
            with writing_temporary(_LIST):
                self._write()

    def _write(self) -> None:
        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table[:BLOCK].unify_dictionaries(), row_group_size=BLOCK)
        self._waiting = [table[BLOCK:]]
        self._num_waiting = len(table[BLOCK:])


def table_of(items: Sequence[Input]) -> pa.Table:
    """Inputs as an Arrow table."""
    names = [field.name for field in dataclasses.fields(Input)]
    columns = [pa.array([getattr(item, name) for item in items], _SCHEMA.field(name).type) for name in names]
    return pa.table(columns, schema=_SCHEMA)


def inputs_in(table: pa.Table) -> list[Input]:
    """The inputs of an Arrow table."""
    plain = table.cast(_PLAIN_SCHEMA)  # dictionaries would be looked up value by value, in ten times the time
    return [Input(*row) for row in zip(*(column.to_pylist() for column in plain.columns), strict=True)]


def in_blocks(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of tables in tables of `BLOCK` rows; the last has the rest."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= BLOCK:
            whole = pa.concat_tables(waiting)
            yield whole[:BLOCK]
            waiting = [whole[BLOCK:]]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)

"""The list of a job's inputs, one row per image or video."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nopad.embedding.table.paths import TablePath, open_whole, write_whole

_BLOCK = 1 << 16
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


@dataclass(frozen=True, slots=True)
class Input:
    """The place of one image or video.

    Attributes:
        id: its name within `source`: relative path, name in the tar, line of the list file; the row number in Parquet
            and datasets, `split/row` where there are splits. Always valid UTF-8: other bytes are written `\\xff`.
        source: the folder, glob or list file as it was given, or the tar, Parquet file or dataset.
        kind: `"image"`, `"video"`, `"tar"`, `"parquet"`, `"dataset"`, or `"broken"` for what could not be listed.
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
    id = os.fsencode(item.id.rpartition("#")[0] if item.note else item.id)
    return item.path.removesuffix(b"/" + id) if item.path.endswith(b"/" + id) else b""


class InputList:
    """Inputs in order, backed by an Arrow table: about 50 bytes and its name for each."""

    def __init__(self, table: pa.Table) -> None:
        if table.schema.remove_metadata() != _SCHEMA:
            raise ValueError(f"table: expected the columns\n{_SCHEMA}\ngot\n{table.schema}")
        self._table = table

    @classmethod
    def of(cls, items: Iterable[Input]) -> InputList:
        """Collect inputs without holding them all as Python objects."""
        names = [field.name for field in dataclasses.fields(Input)]
        iterator = iter(items)
        batches = []
        while block := list(islice(iterator, _BLOCK)):
            columns = [pa.array([getattr(item, name) for item in block], _SCHEMA.field(name).type) for name in names]
            batches.append(pa.record_batch(columns, schema=_SCHEMA))
        return cls(pa.Table.from_batches(batches, _SCHEMA))

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, index: int) -> Input: ...
    @overload
    def __getitem__(self, index: slice) -> list[Input]: ...
    def __getitem__(self, index: int | slice) -> Input | list[Input]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            rows = self._table.slice(start, max(0, stop - start))
            return [Input(*row) for row in zip(*(column.to_pylist() for column in rows.columns), strict=True)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"input {index} of {len(self)}")
        index %= len(self)
        return self[index : index + 1][0]

    def __iter__(self) -> Iterator[Input]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]

    def digest(self) -> str:
        """The SHA-256 in hex of all fields in order, the same however the table is cut into chunks."""
        sha = hashlib.sha256(str(len(self)).encode())
        for start in range(0, len(self), _BLOCK):
            for column in self._table.slice(start, _BLOCK).columns:
                if pa.types.is_integer(column.type):
                    sha.update(column.to_numpy().astype("<i8").tobytes())
                else:
                    data = column.cast(pa.binary())
                    sha.update(pc.call_function("binary_length", [data]).to_numpy().astype("<i8").tobytes())
                    sha.update(b"".join(data.to_pylist()))
        return sha.hexdigest()

    def save(self, path: TablePath, *, check: Callable[[], None] = lambda: None) -> None:
        """Write the list as a Parquet file, all of it or nothing; `check` as in `write_whole`."""
        with write_whole(path, check=check) as file:  # Arrow itself opens no path that is not UTF-8
            pq.write_table(self._table, file, compression="zstd", row_group_size=_BLOCK)

    @classmethod
    def load(cls, path: TablePath) -> InputList:
        """Read what `save` wrote.

        Raises:
            OSError, ValueError: a file that is missing, damaged or something else.
        """
        with open_whole(path) as file:
            return cls(pq.ParquetFile(file).read())

"""Shards of a features table: Parquet files, one row per input, each written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.atomic import sync_folder
from nopad.embedding.table.errors import writing_to
from nopad.embedding.table.format import NUMBERS, TEXTS, Row, ShardFormat, check_row
from nopad.embedding.table.paths import TablePath
from nopad.storage.object_path import ObjectPath

_ROWS_PER_GROUP = 1024
_ROWS_PER_GROUP_WITH_TOKENS = 16
# Long clips end a row group early, so that a reader never needs much more than this for one row.
_TOKEN_BYTES_PER_GROUP = 64 << 20


class ShardWriter:
    """Writes a shard under a temporary name, as its rows come, and renames it once it is whole and on the disk.

    Rows are written 16 at a time with tokens, 1024 without. The same rows, format and metadata give the same bytes with
    the same pyarrow. The context ends by removing what is not finished: the shard's file is as it was.

    Args:
        path: the shard's file; replaced where it exists.
        metadata: written into the file, see `read_metadata`.
        temporary: a new file in an existing folder on the file system of `path`; `None` for an object, which is written
            to a temporary file of this machine and put into its store.
        check: called before the file is renamed; what it raises comes out.

    Raises:
        ValueError: a row that does not fit the format; the message names its id.
        OSError: of the errno that the system gave (no space, read-only, ...), naming the folder and what to do.
    """

    def __init__(
        self,
        path: TablePath,
        format: ShardFormat,
        metadata: Mapping[str, str],
        *,
        temporary: Path | None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._format, self._temporary, self._check = path, format, temporary, check
        self._schema = format.schema(metadata)
        self._group: list[Row] = []
        self._token_bytes = 0
        if isinstance(path, ObjectPath):
            self._folder = Path(tempfile.gettempdir())
        else:
            assert temporary is not None
            self._folder = path.parent
        with ExitStack() as failed:
            failed.callback(self._remove)
            with writing_to(self._folder):
                # "x" follows no link
                self._file: Any = tempfile.TemporaryFile() if temporary is None else open(temporary, "xb")  # noqa: SIM115
            failed.callback(self._file.close)
            with writing_to(self._folder):
                self._writer: Any = pq.ParquetWriter(self._file, self._schema, **_options(format))
            failed.pop_all()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows behind the others."""
        limit = rows_per_group(self._format.token_dimension)
        for row in rows:
            check_row(row, self._format)
            self._group.append(row)
            self._token_bytes += 0 if row.tokens is None else row.tokens.nbytes
            if len(self._group) == limit or self._token_bytes >= _TOKEN_BYTES_PER_GROUP:
                self._write_group()

    def finish(self) -> None:
        """Put the shard in its place."""
        if self._group:
            self._write_group()
        with writing_to(self._folder):
            self._writer.close()
        if isinstance(self._path, ObjectPath):
            self._check()
            self._path.put(self._file)
        else:
            self._rename(self._path)
        self._file.close()
        self._temporary = None

    def _rename(self, path: Path) -> None:
        assert self._temporary is not None
        with writing_to(self._folder):
            self._file.flush()
            os.fsync(self._file.fileno())
        self._check()
        with writing_to(self._folder):
            os.replace(self._temporary, path)
        sync_folder(path.parent)

    def close(self) -> None:
        """Remove what was written, unless it is finished."""
        with suppress(OSError, pa.ArrowException):  # a writer that is left open closes itself later, without its file
            self._writer.close()
        with suppress(OSError):
            self._file.close()
        self._remove()

    def _remove(self) -> None:
        if self._temporary is not None:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _write_group(self) -> None:
        batch = record_batch(self._group, self._format, self._schema)
        with writing_to(self._folder):
            self._writer.write_batch(batch)
        self._group, self._token_bytes = [], 0


def write_shard(
    path: TablePath, rows: Iterable[Row], format: ShardFormat, metadata: Mapping[str, str], *, temporary: Path | None
) -> None:
    """Write a shard of rows, taken as they come; whatever is raised meanwhile, `path` is as it was.

    Args:
        path, metadata, temporary: see `ShardWriter`.

    Raises:
        See `ShardWriter`; or what `rows` raises.
    """
    with ShardWriter(path, format, metadata, temporary=temporary) as shard:
        shard.add(rows)
        shard.finish()


def _options(format: ShardFormat) -> dict[str, Any]:
    return {
        "version": "2.6",
        "data_page_version": "1.0",
        # Floats lie plain and uncompressed: zstd takes 7 % off them and twice the time to write.
        "compression": dict.fromkeys((*TEXTS, *NUMBERS, *_leaves(format)), "zstd"),
        "use_dictionary": ["source", "status", "error", *NUMBERS],
        "write_statistics": [*TEXTS, *NUMBERS],
        "write_page_checksum": True,
        # Page sizes are looked at after each batch of values, and a page must stay below 2 GB.
        "write_batch_size": _ROWS_PER_GROUP if format.token_dimension is None else 1,
    }


def _leaves(format: ShardFormat) -> list[str]:
    """The further columns that have one kind of value; Parquet names the parts of nested ones."""
    return [field.name for field in format.kept or () if not pa.types.is_nested(field.type)]


def rows_per_group(token_dimension: int | None) -> int:
    """Rows of a row group at most, see `ShardFormat`."""
    return _ROWS_PER_GROUP if token_dimension is None else _ROWS_PER_GROUP_WITH_TOKENS


def record_batch(rows: list[Row], format: ShardFormat, schema: pa.Schema) -> pa.RecordBatch:
    """Rows in the columns of a format, whose `schema` it is."""
    columns: list[pa.Array] = [pa.array([_utf8(getattr(row, name)) for row in rows], pa.string()) for name in TEXTS]
    sizes = [(row.width, row.height, *(row.grid or (None, None, None))) for row in rows]
    columns += [pa.array([size[number] for size in sizes], pa.int32()) for number in range(len(NUMBERS))]
    columns += [_embeddings(rows, format)]
    if format.token_dimension is not None:
        values = [None if row.tokens is None else row.tokens.astype("<f2", copy=False).data.cast("B") for row in rows]
        columns += [pa.array(values, pa.large_binary())]
    for number, field in enumerate(format.kept or ()):
        columns += [pa.array([_as(field.type, row.kept[number]) if row.kept else None for row in rows], field.type)]
    return pa.record_batch(columns, schema=schema)


def _as(type: pa.DataType, value: Any) -> Any:
    """A value of a column: one that was read from a shard has Parquet's type, such as milliseconds for seconds."""
    return value.cast(type) if isinstance(value, pa.Scalar) and value.type != type else value


def _utf8(text: str | None) -> str | None:
    """File names and error messages may hold lone surrogates, which Arrow's strings cannot."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _embeddings(rows: list[Row], format: ShardFormat) -> pa.Array:
    missing = np.array([row.embedding is None for row in rows], bool)
    matrix = np.zeros((len(rows), format.dimension), format.embedding_dtype)
    for values, row in zip(matrix, rows, strict=True):
        if row.embedding is not None:
            values[:] = row.embedding
    if format.embedding_list == "fixed":
        flat = pa.array(matrix.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=format.embedding_type(), mask=pa.array(missing))
    offsets = np.concatenate([[0], np.cumsum(~missing * format.dimension)]).astype(np.int32)
    flat = pa.array(matrix[~missing].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=format.embedding_type(), mask=pa.array(missing))

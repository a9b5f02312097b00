"""Shards of a features table: Parquet files, one row per input, each written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

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


def write_shard(
    path: TablePath,
    rows: Iterable[Row],
    format: ShardFormat,
    metadata: Mapping[str, str],
    *,
    temporary: Path | None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a shard under a temporary name and rename it to `path` once it is whole and on the disk.

    Rows are taken as they come and written 16 at a time with tokens, 1024 without. The same rows, format and metadata
    give the same bytes with the same pyarrow. Whatever is raised meanwhile, by `rows` too, the temporary file is
    removed and `path` is as it was.

    Args:
        path: the shard's file; replaced where it exists.
        metadata: written into the file, see `read_metadata`.
        temporary: a new file in an existing folder on the file system of `path`; `None` for an object.
        check: called before the file is renamed; what it raises comes out.

    Raises:
        ValueError: a row that does not fit the format; the message names its id.
        OSError: of the errno that the system gave (no space, read-only, ...), naming the folder and what to do.
    """
    if isinstance(path, ObjectPath):
        _put(path, rows, format, metadata, check)
        return
    assert temporary is not None
    try:
        _write(temporary, rows, format, metadata, path.parent)
        check()
        with writing_to(path.parent):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write(
    temporary: Path, rows: Iterable[Row], format: ShardFormat, metadata: Mapping[str, str], folder: Path
) -> None:
    with writing_to(folder):
        file = open(temporary, "xb")  # noqa: SIM115 - follows no link
    try:
        _write_to(file, rows, format, metadata, folder)
        with writing_to(folder):
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):  # synced above, or of no use
            file.close()


def _put(
    path: ObjectPath,
    rows: Iterable[Row],
    format: ShardFormat,
    metadata: Mapping[str, str],
    check: Callable[[], None],
) -> None:
    """Write a shard to a temporary file of this machine, and put it into its store."""
    folder = Path(tempfile.gettempdir())
    with writing_to(folder):
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    with file:
        _write_to(file, rows, format, metadata, folder)
        check()
        path.put(file)


def _write_to(
    file: BinaryIO, rows: Iterable[Row], format: ShardFormat, metadata: Mapping[str, str], folder: Path
) -> None:
    schema = format.schema(metadata)
    with writing_to(folder):
        writer = pq.ParquetWriter(file, schema, **_options(format))
    try:
        for group in _groups(rows, format):
            batch = record_batch(group, format, schema)
            with writing_to(folder):
                writer.write_batch(batch)
    except BaseException:
        # A writer that is left open closes itself later, when its file is gone.
        with suppress(OSError, pa.ArrowException):
            writer.close()
        raise
    with writing_to(folder):
        writer.close()


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


def _groups(rows: Iterable[Row], format: ShardFormat) -> Iterator[list[Row]]:
    limit = _ROWS_PER_GROUP if format.token_dimension is None else _ROWS_PER_GROUP_WITH_TOKENS
    group: list[Row] = []
    token_bytes = 0
    for row in rows:
        check_row(row, format)
        group.append(row)
        token_bytes += 0 if row.tokens is None else row.tokens.nbytes
        if len(group) == limit or token_bytes >= _TOKEN_BYTES_PER_GROUP:
            yield group
            group, token_bytes = [], 0
    if group:
        yield group


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

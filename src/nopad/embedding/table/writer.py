"""Shards of a features table: Parquet files, one row per input, each written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.atomic import sync_folder

PREFIX = "nopad."
FORMAT = "1"
_TEXT = ("id", "source", "status", "error")
NUMBERS = ("width", "height", "grid_t", "grid_h", "grid_w")
COLUMNS = (*_TEXT, *NUMBERS, "embedding")
TOKENS = "tokens"
OK, FAILED, GONE, CHANGED = "ok", "failed", "gone", "changed"
STATUSES = (OK, FAILED, GONE, CHANGED)
"""Of a row: with features; without, for the reason in `error`; marked by an update, its input gone from the sources or
changed, and then in another row."""
DTYPES, LISTS = ("float32", "float16"), ("fixed", "variable")
KEPT = "kept"
_FORMAT_KEYS = ("format", "embedding.width", "tokens.dtype", "tokens.width", "tokens.layers", "tokens.pool", KEPT)

_ROWS_PER_GROUP = 1024
_ROWS_PER_GROUP_WITH_TOKENS = 16
# Long clips end a row group early, so that a reader never needs much more than this for one row.
_TOKEN_BYTES_PER_GROUP = 64 << 20
# Parquet counts a value's bytes in an int32.
MAX_TOKEN_BYTES = 2**31 - 1

_ADVICE = {
    errno.ENOSPC: "free space on its disk and run the job again; finished shards are kept",
    errno.EDQUOT: "the disk quota is used up: free some of it and run the job again; finished shards are kept",
    errno.EROFS: "it lies on a read-only file system; choose a folder that can be written",
    errno.EACCES: "it may not be written by this user; change its permissions or choose another folder",
    errno.EPERM: "it may not be written by this user; change its permissions or choose another folder",
    errno.ENOENT: "it must exist while the job runs; make it and run the job again",
    errno.EXDEV: "temporary and finished shards must lie on one file system",
}


def folder_error(error: OSError, folder: Path) -> OSError:
    """The same error, of the same errno and class, with the folder and advice in its message."""
    advice = _ADVICE.get(error.errno or 0, "see to the disk and run the job again; finished shards are kept")
    return OSError(error.errno, f"{folder}: {error.strerror or error}; {advice}")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise folder_error(error, folder) from error


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one input: its features, or why there are none.

    `width` and `height` are the pixels of the upright picture, `grid` its `(t, h, w)` patches; `embedding` is `(D,)`,
    `tokens` is `(t * h * w, D)` float16. An ok row has all of them (tokens where the format stores them), a failed row
    no features. `kept` has the values of the format's further columns, as Python's or Arrow's, or is empty for null.
    """

    id: str
    source: str
    status: str = "ok"
    error: str | None = None
    width: int | None = None
    height: int | None = None
    grid: tuple[int, int, int] | None = None
    embedding: np.ndarray | None = None
    tokens: np.ndarray | None = None
    kept: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """How features lie in a shard.

    Args:
        dimension: length of an embedding.
        embedding_dtype: "float32" or "float16".
        embedding_list: "fixed" for a FixedSizeList, "variable" for a plain list: some databases cannot read the fixed.
        token_dimension: the hidden size where tokens are stored, else None.
        token_layers: the layers of which tokens are stored; None for those of the model alone, without an axis of
            layers.
        tokens_pool: side of the squares of tokens of which the mean is stored.
        kept: further columns, of other names than those of the table.
    """

    dimension: int
    embedding_dtype: str = "float32"
    embedding_list: str = "fixed"
    token_dimension: int | None = None
    token_layers: tuple[int, ...] | None = None
    tokens_pool: int = 1
    kept: pa.Schema | None = None

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension {self.dimension}, expected at least 1")
        if self.embedding_dtype not in DTYPES:
            raise ValueError(f"embedding_dtype {self.embedding_dtype!r}, expected 'float32' or 'float16'")
        if self.embedding_list not in LISTS:
            raise ValueError(f"embedding_list {self.embedding_list!r}, expected 'fixed' or 'variable'")
        if self.token_dimension is not None and self.token_dimension < 1:
            raise ValueError(f"token_dimension {self.token_dimension}, expected at least 1, or None for no tokens")
        if taken := {*self.kept_names} & {*COLUMNS, TOKENS}:
            raise ValueError(f"kept: the table has columns {', '.join(sorted(taken))} of its own")

    @property
    def kept_names(self) -> list[str]:
        """Names of the further columns."""
        return [] if self.kept is None else self.kept.names

    def schema(self, metadata: Mapping[str, str]) -> pa.Schema:
        """The columns, and `metadata` with the format's own keys, under the prefix `nopad.` and in sorted order."""
        format_metadata = {"format": FORMAT, "embedding.width": str(self.dimension)}
        if self.token_dimension is not None:
            format_metadata |= {"tokens.dtype": "float16", "tokens.width": str(self.token_dimension)}
            if self.token_layers is not None:
                format_metadata["tokens.layers"] = ",".join(map(str, self.token_layers))
            if self.tokens_pool > 1:
                format_metadata["tokens.pool"] = str(self.tokens_pool)
        job_metadata = {key: value for key, value in metadata.items() if key not in _FORMAT_KEYS}
        fields = [pa.field(name, pa.string()) for name in _TEXT]
        fields += [pa.field(name, pa.int32()) for name in NUMBERS]
        fields += [pa.field("embedding", self._embedding_type())]
        if self.token_dimension is not None:
            fields += [pa.field(TOKENS, pa.large_binary())]
        if self.kept is not None:
            fields += list(self.kept)
            format_metadata |= {KEPT: json.dumps(self.kept_names)}
        all_metadata = sorted((job_metadata | format_metadata).items())
        return pa.schema(fields, {PREFIX + key: value for key, value in all_metadata})

    def _embedding_type(self) -> pa.DataType:
        value = pa.from_numpy_dtype(np.dtype(self.embedding_dtype))
        return pa.list_(value, self.dimension) if self.embedding_list == "fixed" else pa.list_(value)


def token_shape(grid: tuple[int, int, int], layers: tuple[int, ...] | None = None, pool: int = 1) -> tuple[int, ...]:
    """The shape of a row's stored tokens without their width: `(t, h, w)`, with an axis of layers where there is one.

    Args:
        grid: of the patches.
        layers, pool: as `ShardFormat` has them.
    """
    t, h, w = grid
    shape = t, -(-h // pool), -(-w // pool)
    return shape if layers is None else (len(layers), *shape)


def write_shard(
    path: Path,
    rows: Iterable[Row],
    format: ShardFormat,
    metadata: Mapping[str, str],
    *,
    temporary: Path,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write a shard under a temporary name and rename it to `path` once it is whole and on the disk.

    Rows are taken as they come and written 16 at a time with tokens, 1024 without. The same rows, format and metadata
    give the same bytes with the same pyarrow. Whatever is raised meanwhile, by `rows` too, the temporary file is
    removed and `path` is as it was.

    Args:
        path: the shard's file; replaced where it exists.
        metadata: written into the file, see `read_metadata`.
        temporary: a new file in an existing folder on the file system of `path`.
        check: called before the file is renamed; what it raises comes out.

    Raises:
        ValueError: a row that does not fit the format; the message names its id.
        OSError: of the errno that the system gave (no space, read-only, ...), naming the folder and what to do.
    """
    try:
        _write(temporary, rows, format, metadata, path.parent)
        check()
        with _writing_to(path.parent):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write(
    temporary: Path, rows: Iterable[Row], format: ShardFormat, metadata: Mapping[str, str], folder: Path
) -> None:
    schema = format.schema(metadata)
    with _writing_to(folder):
        file = open(temporary, "xb")  # noqa: SIM115 - follows no link
    try:
        with _writing_to(folder):
            writer = pq.ParquetWriter(file, schema, **_options(format))
        try:
            for group in _groups(rows, format):
                batch = _batch(group, format, schema)
                with _writing_to(folder):
                    writer.write_batch(batch)
        except BaseException:
            # A writer that is left open closes itself later, when its file is gone.
            with suppress(OSError, pa.ArrowException):
                writer.close()
            raise
        with _writing_to(folder):
            writer.close()
            file.flush()
            os.fsync(file.fileno())
    finally:
        with suppress(OSError):  # synced above, or of no use
            file.close()


def _options(format: ShardFormat) -> dict[str, Any]:
    return {
        "version": "2.6",
        "data_page_version": "1.0",
        # Floats lie plain and uncompressed: zstd takes 7 % off them and twice the time to write.
        "compression": dict.fromkeys((*_TEXT, *NUMBERS, *_leaves(format)), "zstd"),
        "use_dictionary": ["source", "status", "error", *NUMBERS],
        "write_statistics": [*_TEXT, *NUMBERS],
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
        _check(row, format)
        group.append(row)
        token_bytes += 0 if row.tokens is None else row.tokens.nbytes
        if len(group) == limit or token_bytes >= _TOKEN_BYTES_PER_GROUP:
            yield group
            group, token_bytes = [], 0
    if group:
        yield group


def _check(row: Row, format: ShardFormat) -> None:
    if row.status not in STATUSES:
        raise ValueError(f"row {row.id!r}: status {row.status!r}, expected one of {', '.join(STATUSES)}")
    if row.status != OK:
        if row.embedding is not None or row.tokens is not None:
            raise ValueError(f"row {row.id!r}: features on a {row.status} row, expected none")
        return
    for name in ("width", "height", "grid", "embedding"):
        if getattr(row, name) is None:
            raise ValueError(f"row {row.id!r}: {name} missing on an ok row")
    _check_array(row, "embedding", row.embedding, format.embedding_dtype, (format.dimension,))
    if format.token_dimension is None:
        if row.tokens is not None:
            raise ValueError(f"row {row.id!r}: tokens for a format without token_dimension")
        return
    if row.tokens is None:
        raise ValueError(f"row {row.id!r}: tokens missing on an ok row, expected for token_dimension")
    assert row.grid is not None
    t, h, w = row.grid
    number = math.prod(token_shape((t, h, w), format.token_layers, format.tokens_pool))
    _check_array(row, "tokens", row.tokens, "float16", (number, format.token_dimension))
    if row.tokens.nbytes > MAX_TOKEN_BYTES:
        raise ValueError(f"row {row.id!r}: tokens of {row.tokens.nbytes} bytes, Parquet takes {MAX_TOKEN_BYTES}")


def _check_array(row: Row, name: str, array: np.ndarray | None, dtype: str, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"row {row.id!r}: {name} is {type(array).__name__}, expected a NumPy array")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(f"row {row.id!r}: {name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"row {row.id!r}: {name} has strides {array.strides}, expected a contiguous array")


def _batch(rows: list[Row], format: ShardFormat, schema: pa.Schema) -> pa.RecordBatch:
    columns: list[pa.Array] = [pa.array([_utf8(getattr(row, name)) for row in rows], pa.string()) for name in _TEXT]
    sizes = [(row.width, row.height, *(row.grid or (None, None, None))) for row in rows]
    columns += [pa.array(values, pa.int32()) for values in zip(*sizes, strict=True)]
    columns += [_embeddings(rows, format)]
    if format.token_dimension is not None:
        values = [None if row.tokens is None else row.tokens.astype("<f2", copy=False).data.cast("B") for row in rows]
        columns += [pa.array(values, pa.large_binary())]
    for number, field in enumerate(format.kept or ()):
        columns += [pa.array([row.kept[number] if row.kept else None for row in rows], field.type)]
    return pa.record_batch(columns, schema=schema)


def _utf8(text: str | None) -> str | None:
    """File names and error messages may hold lone surrogates, which Arrow's strings cannot."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _embeddings(rows: list[Row], format: ShardFormat) -> pa.Array:
    missing = np.array([row.embedding is None for row in rows])
    matrix = np.zeros((len(rows), format.dimension), format.embedding_dtype)
    for values, row in zip(matrix, rows, strict=True):
        if row.embedding is not None:
            values[:] = row.embedding
    if format.embedding_list == "fixed":
        flat = pa.array(matrix.reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=format._embedding_type(), mask=pa.array(missing))
    offsets = np.concatenate([[0], np.cumsum(~missing * format.dimension)]).astype(np.int32)
    flat = pa.array(matrix[~missing].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=format._embedding_type(), mask=pa.array(missing))

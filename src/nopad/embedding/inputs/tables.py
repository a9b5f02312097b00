"""Images in Parquet files and saved datasets, listed without reading one; in a process that may be ended."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.counts import counted
from nopad.embedding.inputs.arrow_stream import MAX_ROWS, ArrowStream
from nopad.embedding.inputs.fetched import open_arrow, table_size
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.saved_datasets import saved_splits
from nopad.local_paths import utf8
from nopad.preprocessing.files import why
from nopad.preprocessing.reachable import is_unreachable, missing_mount
from nopad.storage.addresses import scheme_of

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "bytes", "image_bytes")

_LISTS = {
    pa.types.is_list: pa.list_,
    pa.types.is_large_list: pa.large_list,
    pa.types.is_list_view: pa.list_view,
    pa.types.is_large_list_view: pa.large_list_view,
}

MAX_NAME_LENGTH = 4096
"""Characters of a row's name; one that is longer is none."""

_NUM_NAMES, _NAMES_LENGTH = 8192, 1 << 16  # of the rows that are listed at a time
# What Arrow raises on damaged files.
ARROW_DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError)


def why_unreachable(error: BaseException, path: bytes) -> str:
    """Why a table cannot be reached; empty where it is damaged or gone."""
    if is_unreachable(error):
        return why(error)
    return "" if scheme_of(path) else missing_mount(error, path, os.path.dirname(path))


def raise_if_unreachable(error: Exception, path: bytes = b"/") -> None:
    """Raise an error that says nothing about the file."""
    if why_unreachable(error, path):
        raise error


class NoImageColumnError(ValueError):
    """A table without the column of images."""


def image_column(schema: pa.Schema, text: str, requested: str | None) -> str:
    """Choose the column of encoded images: binary, or a struct with binary `bytes`, dictionary-encoded or not.

    Raises:
        NoImageColumnError: no such column.
        ValueError: several, with the columns that there are.
    """
    candidates = [field.name for field in schema if _holds_images(field.type)]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if requested is not None:
        if requested in candidates:
            return requested
        reason = f"image_column: {requested} is no column of image bytes; got the columns {columns}"
        raise NoImageColumnError(f"{text}: {reason}")
    conventional = [name for name in candidates if name in IMAGE_COLUMNS]
    if len(candidates) == 1 or len(conventional) == 1:
        return (conventional if len(conventional) == 1 else candidates)[0]
    if not candidates:
        raise NoImageColumnError(f"{text}: no column of image bytes in {columns}")
    raise ValueError(
        f"{text}: {len(candidates)} columns of bytes in {columns}; choose one with image_column (--image-column)"
    )


def _holds_images(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and _is_binary(field.type) for field in type)
    return _is_binary(type)


def _is_binary(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def plain_type(type: pa.DataType) -> pa.DataType:
    """The same type, with another for those in it whose values Arrow does not copy one by one: views, and tensors."""
    if pa.types.is_string_view(type):
        return pa.string()
    if pa.types.is_binary_view(type):
        return pa.binary()
    if isinstance(type, pa.FixedShapeTensorType):
        return plain_type(type.storage_type)
    if pa.types.is_dictionary(type):
        return pa.dictionary(type.index_type, plain_type(type.value_type), type.ordered)
    if pa.types.is_map(type):
        return pa.map_(plain_type(type.key_type), plain_type(type.item_type), type.keys_sorted)
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(plain_type(field.type)) for field in type])
    if pa.types.is_fixed_size_list(type):
        return pa.list_(type.value_field.with_type(plain_type(type.value_type)), type.list_size)
    for is_list, list_of in _LISTS.items():
        if is_list(type):
            return list_of(type.value_field.with_type(plain_type(type.value_type)))
    return type


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a table that follow each other.

    Attributes:
        first: number of the first of them, in a dataset within its split.
        count: how many.
        note: as in `Input`.
        names: theirs as far as they have one, fewer than rows where the column of names ends early; empty for none.
        ends_group: whether a row group ends with them.
    """

    first: int
    count: int
    note: str
    names: tuple[str, ...] = ()
    ends_group: bool = False


@dataclass(frozen=True, slots=True)
class Broken:
    """What of a table cannot be read, by the name of its file, and why."""

    name: str
    reason: str


def parquet_rows(path: bytes, text: str, column: str | None, id_column: str | None = None) -> Iterator[Rows | Broken]:
    """The rows of a Parquet file; what is broken where its footer cannot be read or contradicts itself.

    Raises:
        NoImageColumnError, ValueError: see `image_column`; or no column `id_column`.
    """
    name = as_text(os.path.basename(path))
    try:
        size = table_size(path)
        file = open_parquet(path)
        schema, metadata = file.schema_arrow, file.metadata
        _ = schema.names  # may be no text
        groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        file.close(force=True)
    except ARROW_DAMAGE as error:
        raise_if_unreachable(error, path)
        yield Broken(name, f"no Parquet file, or damaged: {why(error)}")
        return
    note = image_column(schema, text, column)
    total = sum(groups)
    if any(rows < 0 for rows in groups) or total > max(MAX_ROWS, size):
        claim = f"its row groups claim {counted(total, 'row')} in {counted(size, 'byte')}"
        yield Broken(name, f"damaged: {claim}; get the file again")
        return
    names = _parquet_names(path, schema, text, id_column)
    for first, rows in zip(accumulate(groups, initial=0), groups, strict=False):
        yield from _named(first, rows, note, names, is_group=True)
    if metadata.num_rows != total:
        counts = f"its footer says {counted(metadata.num_rows, 'row')}, its row groups {total}, which are read"
        yield Broken(name, f"damaged: {counts}; get the file again")


def _named(first: int, count: int, note: str, names: Iterator[str], *, is_group: bool = False) -> Iterator[Rows]:
    """Rows by their names, in parts whose names take little; the last part has those without."""
    names = islice(names, count)
    while part := _few(names):
        yield Rows(first, len(part), note, part, is_group and len(part) == count)
        first, count = first + len(part), count - len(part)
    if count:
        yield Rows(first, count, note, ends_group=is_group)


def _few(names: Iterator[str]) -> tuple[str, ...]:
    part, length = [], 0
    while length < _NAMES_LENGTH and len(part) < _NUM_NAMES and (name := next(names, None)) is not None:
        part.append(name)
        length += len(name)
    return tuple(part)


def _check_id_column(schema: pa.Schema, text: str, id_column: str) -> None:
    if id_column not in schema.names:
        raise ValueError(f"{text}: --id-column {id_column} is no column; got the columns {', '.join(schema.names)}")
    if pa.types.is_nested(schema.field(id_column).type):
        raise ValueError(
            f"{text}: --id-column {id_column} is {schema.field(id_column).type}, expected names or numbers"
        )


def _parquet_names(path: bytes, schema: pa.Schema, text: str, id_column: str | None) -> Iterator[str]:
    """The names of rows; fewer where the column is damaged."""
    if id_column is None:
        return
    _check_id_column(schema, text, id_column)
    try:
        file = open_parquet(path, in_pages=False)
        for batch in file.iter_batches(columns=[id_column], use_threads=False):
            yield from _names(batch.column(0))
        file.close(force=True)
    except ARROW_DAMAGE as error:
        raise_if_unreachable(error, path)
        return


def _names(column: pa.Array) -> Iterator[str]:
    """Values as text, empty for null and for what is too long to be a name."""
    for value in column.to_pylist():
        if isinstance(value, str | bytes):
            value = as_text(utf8(value) if isinstance(value, str) else value)
        name = "" if value is None else str(value)
        yield name if len(name) <= MAX_NAME_LENGTH else ""


def open_parquet(path: bytes, *, in_pages: bool = True) -> pq.ParquetFile:
    """Open a Parquet file to be read column by column; `close(force=True)` closes it.

    Args:
        in_pages: read a column page by page, so that little of a large row group is held. Arrow then allocates what the
            header of a page claims, up to 2 GiB; else what there is.

    Raises:
        One of `ARROW_DAMAGE`.
    """
    # Not mapped: a mapped file that is cut short while it is read would kill the process. With pre_buffer, Arrow's
    # default, whole row groups would be held.
    return pq.ParquetFile(open_arrow(path), buffer_size=1 << 20 if in_pages else 0, pre_buffer=False)


def _dataset_names(stream: ArrowStream, text: str, id_column: str | None) -> Iterator[str]:
    """The names of the rows of a file; fewer where it is damaged."""
    if id_column is None or stream.schema is None:
        return
    _check_id_column(stream.schema, text, id_column)
    row = 0
    try:
        while row < len(stream):
            start, batch = stream.batch_of(row)
            column = batch.column(id_column)
            column.validate(full=True)  # Arrow trusts the offsets in a batch
            yield from _names(column)
            row = start + len(batch)
    except ARROW_DAMAGE as error:
        raise_if_unreachable(error)
        return


def dataset_rows(folder: bytes, text: str, column: str | None, id_column: str | None = None) -> Iterator[Rows | Broken]:
    """The rows of a saved Hugging Face dataset, of all its splits, and what of it cannot be read.

    Raises:
        NoImageColumnError, ValueError: see `image_column`.
    """
    try:
        splits = saved_splits(folder)
    except ARROW_DAMAGE as error:
        raise_if_unreachable(error, folder)
        yield Broken(as_text(os.path.basename(folder)), f"no dataset that can be loaded: {why(error)}")
        return
    for split in splits:
        start = 0
        for path in split.files:
            stream = ArrowStream(path)
            if stream.schema is not None:
                name = f"{text} {split.name}".rstrip()
                note = f"{split.name}/{image_column(stream.schema, name, column)}"
                yield from _named(start, len(stream), note, _dataset_names(stream, name, id_column))
            if stream.damage:
                yield Broken(as_text(os.path.relpath(path, folder)), stream.damage)
            start += len(stream)

"""A finished table as a dataset of another format: one Parquet file, Lance, Iceberg."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.atomic import atomic_write
from nopad.embedding.table import reader as stored
from nopad.extras import install
from nopad.local_paths import check_local
from nopad.search.batches import iterate_features
from nopad.search.shards import shards_of

ExportFormat = Literal["parquet", "lance", "iceberg"]

_MAX_ROWS, _MAX_BYTES = 1 << 16, 1 << 28  # that are appended to an Iceberg table at a time


def export_features(
    folder: str | Path,
    out: str | Path,
    *,
    to: ExportFormat,
    columns: Sequence[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the rows with features of a finished table to a dataset that does not exist yet.

    Vectors and tokens have the table's types; only in Iceberg, which has neither, lists of fixed size and float16
    become lists of float32. Rows stream from shard to dataset, a row group at a time.

    Args:
        folder: of the table, or its address in a store.
        out: a file for `"parquet"`; a folder or an address for `"lance"`, as Lance takes it; for `"iceberg"`
            `[CATALOG:]NAMESPACE.TABLE` of a catalog that PyIceberg is configured for.
        columns: names of the table's columns, each once; all unless given.
        progress: called with the number of rows so far.

    Returns:
        The number of rows.

    Raises:
        ValueError: a table that `read_features` refuses, columns that are unknown or there twice, a dataset
            that exists, or no catalog.
        OSError: what cannot be read or written.
        ImportError: a package is missing.
    """
    if not os.fspath(out):
        raise ValueError("out: expected a file, a folder or a table of a catalog, got ''")
    if to not in get_args(ExportFormat):
        raise ValueError(f"to: expected one of {', '.join(get_args(ExportFormat))}, got {to!r}")
    first, *_ = shards_of(folder, partial=False)
    with stored.opened(first.path) as file:
        schema = file.schema_arrow
    if columns is not None:
        if isinstance(columns, str) or not columns or len({*columns}) < len(columns):
            raise ValueError(f"columns: expected a list of different names, at least one, got {columns!r:.80}")
        if unknown := [name for name in columns if name not in schema.names]:
            raise ValueError(f"columns: {first.path} has no {unknown[0]!r:.80}, but {', '.join(schema.names)}")
        schema = pa.schema([schema.field(name) for name in columns], schema.metadata)
    rows = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in iterate_features(folder, columns=columns):
            yield batch
            rows += batch.num_rows
            if progress is not None:
                progress(rows)

    writers = {"parquet": _write_parquet, "lance": _write_lance, "iceberg": _write_iceberg}
    writers[to](batches(), schema, os.fspath(out))
    return rows


def _write_parquet(batches: Iterator[pa.RecordBatch], schema: pa.Schema, out: str) -> None:
    """One file, which has the metadata of the table's shards."""
    check_local("out", out)
    if os.path.lexists(out):
        raise ValueError(f"out: {out} exists; name another file, or remove it")
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def _write_lance(batches: Iterator[pa.RecordBatch], schema: pa.Schema, out: str) -> None:
    try:
        lance: Any = import_module("lance")
    except ImportError as error:
        raise ImportError(f"to: 'lance' needs pylance ({error}): {install('lance')}") from error
    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), out, mode="create")
    except OSError as error:
        if "already exists" in str(error):
            raise ValueError(f"out: {out} exists; name another folder, or remove it") from error
        raise


def _write_iceberg(batches: Iterator[pa.RecordBatch], schema: pa.Schema, out: str) -> None:
    """A new table, of which readers see all rows or none."""
    try:
        load_catalog: Any = import_module("pyiceberg.catalog").load_catalog
        errors: Any = import_module("pyiceberg.exceptions")
    except ImportError as error:
        raise ImportError(f"to: 'iceberg' needs PyIceberg ({error}): {install('iceberg')}") from error
    catalog_name, _, identifier = out.rpartition(":")
    if "." not in identifier or not all(identifier.split(".")):
        raise ValueError(f"out: expected [CATALOG:]NAMESPACE.TABLE, got {out!r}")
    catalog = load_catalog(catalog_name or None)
    if catalog.table_exists(identifier):
        raise ValueError(f"out: {identifier} exists in the catalog; name another table, or drop it")
    schema = pa.schema([pa.field(field.name, _iceberg_type(field.type)) for field in schema])
    try:
        with catalog.create_table_transaction(identifier, schema) as transaction:
            for table in _large(batches, schema):
                transaction.append(table)
    except errors.NoSuchNamespaceError as error:
        raise ValueError(f"out: the catalog has no namespace {identifier.rpartition('.')[0]}; create it") from error
    except errors.CommitFailedException as error:
        raise ValueError(f"out: {identifier} was not created: {error}; export it again") from error


def _large(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Batches of a table in the types of `schema`, many together: each becomes a file at least."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(each.num_rows for each in waiting) >= _MAX_ROWS or sum(each.nbytes for each in waiting) >= _MAX_BYTES:
            yield pa.Table.from_batches(waiting).cast(schema)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting).cast(schema)


def _iceberg_type(kind: pa.DataType) -> pa.DataType:
    """The nearest type that Iceberg has: there, lists have no fixed size, and floats no 16 bits."""
    if pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind):
        return pa.list_(_iceberg_type(kind.value_type))
    return pa.float32() if pa.types.is_float16(kind) else kind

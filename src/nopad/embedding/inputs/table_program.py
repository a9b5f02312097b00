"""The program of the processes that list tables and read their values; tables are not trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from nopad.embedding.inputs.arrow_stream import ArrowStream
from nopad.embedding.inputs.columns import Column, DatasetColumn, ParquetColumn
from nopad.embedding.inputs.fetched import set_current
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.saved_datasets import files_of
from nopad.embedding.inputs.table_requests import Cells, Listing, Schema, Table, Values
from nopad.embedding.inputs.tables import (
    ARROW_DAMAGE,
    Broken,
    NoImageColumnError,
    dataset_rows,
    open_parquet,
    parquet_rows,
    plain_type,
    raise_if_unreachable,
    why_unreachable,
)
from nopad.inference_imports import import_pyarrow
from nopad.pipeline.decode_process import LARGE_FILE_BYTES
from nopad.pipeline.forked import answer, send_bytes
from nopad.pipeline.request_process import MAX_REASON, serve_requests
from nopad.preprocessing.limits import MAX_BYTES

_AHEAD_BYTES = 1 << 20  # of values that are sent together
_BATCH_BYTES, _BATCH_ROWS = 1 << 23, 256
_COPIES = 3  # of a value while it is read: its page, what is made of that, what is sent
_MAX_PATH = 1 << 16


class TableProgram:
    """Answers requests, with the rows that it reads as progress: the first of them, and the one behind the last."""

    def prepare(self) -> None:
        """See `Program.prepare`; this module has imported everything else."""
        import_pyarrow()

    def serve(self, connection: Connection) -> None:
        """See `Program.serve`."""
        opened = _OpenTable(connection)

        def memory(request: Any) -> int:
            opened.open(request.table)
            return _COPIES * opened.max_value_bytes

        answers = {kind: partial(answer_to, opened) for kind, answer_to in _ANSWERS.items()}

        def unreachable(request: Any, error: BaseException) -> str:
            return "" if request is None else why_unreachable(error, request.table.path)

        serve_requests(connection, answers, memory, ARROW_DAMAGE, unreachable)


class _OpenTable:
    """The columns of one table that are open."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._table: Table | None = None
        self._columns: dict[str, Column] = {}
        self.max_value_bytes = 0

    def open(self, table: Table) -> None:
        """Turn to a table; columns of another one are closed."""
        if table == self._table:
            return
        while self._columns:
            self._columns.popitem()[1].close()
        set_current(self._connection, table.num_bytes)
        self._table, self.max_value_bytes = table, min(MAX_BYTES, table.max_bytes())

    def column(self, name: str) -> Column:
        """A column.

        Raises:
            One of `ARROW_DAMAGE`.
        """
        assert self._table is not None
        if name not in self._columns:
            table = self._table
            if table.kind == "parquet":
                self._columns[name] = ParquetColumn(table.path, name, self._report)
            else:
                self._columns[name] = DatasetColumn(table.path, table.split or "", name, self._report)
        return self._columns[name]

    def _report(self, start: int, stop: int) -> None:
        answer(self._connection, progress=[start, stop])


def _list(opened: _OpenTable, connection: Connection, request: Listing) -> None:
    rows_of = parquet_rows if request.table.kind == "parquet" else dataset_rows
    try:
        for part in rows_of(request.table.path, request.text, request.column, request.id_column):
            if isinstance(part, Broken):
                part = Broken(part.name[:MAX_REASON], as_text(part.reason)[:MAX_REASON])
            answer(connection, **asdict(part))
    except ValueError as error:
        raise_if_unreachable(error)
        answer(connection, refused=str(error)[:MAX_REASON], no_images=isinstance(error, NoImageColumnError))
    else:
        answer(connection, end=True)


def _send_schema(opened: _OpenTable, connection: Connection, request: Schema) -> None:
    table = request.table
    if table.kind == "parquet":
        file = open_parquet(table.path)
        schema = file.schema_arrow
        file.close(force=True)
    else:
        files = files_of(table.path, table.split or "")
        schema = (ArrowStream(files[0]).schema if files else None) or pa.schema([])
    fields = [pa.field(field.name, plain_type(field.type), field.nullable) for field in schema]
    data = pa.schema(fields).serialize().to_pybytes()
    answer(connection, bytes=len(data))
    send_bytes(connection, memoryview(data))


def _send_cells(opened: _OpenTable, connection: Connection, request: Cells) -> None:
    column = opened.column(request.column)
    value = _image(column.value(request.row))
    if value is None:
        answer(connection, null=True)
    elif isinstance(value, str):
        answer(connection, path=value[:_MAX_PATH])
    elif len(value) > opened.max_value_bytes:
        answer(connection, error=f"{len(value)} bytes, expected at most {opened.max_value_bytes} of such a file")
    elif len(value) >= LARGE_FILE_BYTES and not request.takes_large:
        answer(connection, large=len(value))
    else:
        values = [value, *_more(column, request, _AHEAD_BYTES - len(value))]
        answer(connection, sizes=list(map(len, values)))
        for value in values:
            send_bytes(connection, memoryview(value))


def _more(column: Column, request: Cells, size: int) -> Iterator[bytes]:
    """The images behind the first, as far as they are there and plain."""
    for row in range(request.row + 1, request.row + request.count):
        if not column.is_loaded(row):
            return
        try:
            value = _image(column.value(row))
        except (*ARROW_DAMAGE, MemoryError):
            return
        if not isinstance(value, bytes) or (size := size - len(value)) < 0:
            return
        yield value


def _image(array: pa.Array) -> bytes | str | None:
    """The bytes of an image, or the path of its file, or neither."""
    value = array[0].as_py()
    path = None
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if value is None and path and isinstance(path, str | bytes):
        return path if isinstance(path, str) else path.decode("utf-8", "surrogateescape")
    if not isinstance(value, bytes | None):
        raise TypeError(f"expected bytes, got {type(value).__name__}")
    return value


def _send_values(opened: _OpenTable, connection: Connection, request: Values) -> None:
    columns = [_column(opened, name) for name in request.columns]
    left = request.table.max_bytes()
    done, count = 0, 1
    while done < len(request.rows):
        rows = request.rows[done : done + count]
        values = [[_scalar(column, row) for row in rows] for column in columns]
        size = _send_batches(connection, values, len(rows), left)
        left -= size
        done += len(rows)
        count = min(_BATCH_ROWS, max(1, len(rows) * _BATCH_BYTES // max(size, 1)))


def _send_batches(connection: Connection, values: Sequence[Sequence[pa.Scalar | None]], count: int, left: int) -> int:
    """Send rows in one batch, or in several where one takes too much; returns their bytes."""
    try:
        data = _batch(values)
    except (*ARROW_DAMAGE, MemoryError):
        data = None
    if data is None or data.nbytes > left:
        if count > 1:
            half = count // 2
            sent = _send_batches(connection, [column[:half] for column in values], half, left)
            return sent + _send_batches(connection, [column[half:] for column in values], count - half, left - sent)
        data = memoryview(b"")
    answer(connection, rows=count, bytes=data.nbytes)
    send_bytes(connection, data)
    return data.nbytes


def _batch(values: Sequence[Sequence[pa.Scalar | None]]) -> memoryview:
    """A stream of one batch, of the columns that have a value."""
    arrays = {}
    for number, column in enumerate(values):
        type = next((value.type for value in column if value is not None), None)
        if type is not None:
            arrays[str(number)] = pa.array(column, type)
    if not arrays:
        return memoryview(b"")
    batch = pa.record_batch(arrays)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def _column(opened: _OpenTable, name: str) -> Column | None:
    try:
        return opened.column(name)
    except ARROW_DAMAGE as error:
        raise_if_unreachable(error)
        return None


def _scalar(column: Column | None, row: int) -> pa.Scalar | None:
    if column is None:
        return None
    try:
        value = column.value(row)
        plain = plain_type(value.type)
        value = (value if plain == value.type else value.cast(plain))[0]
    except (*ARROW_DAMAGE, MemoryError) as error:
        raise_if_unreachable(error)
        return None
    return value if value.is_valid else None


_ANSWERS: dict[type, Any] = {Listing: _list, Schema: _send_schema, Cells: _send_cells, Values: _send_values}

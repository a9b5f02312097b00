"""Tables listed and read in processes that can be ended, on the side of the job.

Arrow may wait, take memory without end or crash over a file that is damaged, or made for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, TypeVar

import pyarrow as pa

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.reaching import name_of, retry, unreachable_source
from nopad.embedding.inputs.table_program import TableProgram
from nopad.embedding.inputs.table_requests import Cells, Listing, Schema, Table, Values
from nopad.embedding.inputs.tables import MAX_ROWS, Broken, NoImageColumnError, Rows
from nopad.embedding.inputs.units import UnitEdge
from nopad.pipeline.channel import checked_count, count_in, name_in, text_in, valid_text
from nopad.pipeline.request_process import (
    LostProcessError,
    RequestProcess,
    UnreachableFileError,
    UnreadableError,
)
from nopad.preprocessing.files import why
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS, MAX_BYTES
from nopad.preprocessing.reachable import is_unreachable
from nopad.storage import objects
from nopad.storage.addresses import scheme_of

Scalars = list[pa.Scalar | None]
Result = TypeVar("Result")

_MAX_SCHEMA_BYTES = 1 << 24
_MAX_AHEAD = 64  # images that are sent together
_EVERY_ROW = 0, 1 << 63


class TableProcess(RequestProcess):
    """A process that lists tables and reads their values.

    Args:
        timeout: see `RequestProcess`.
    """

    def __init__(self, timeout: float | None = INPUT_TIMEOUT_SECONDS) -> None:
        super().__init__(TableProgram(), timeout)
        self._address = b""  # of the object that is read
        self.reading = _EVERY_ROW
        """The first row of those that were read last in one go, and the one behind the last of them."""

    def inputs(
        self, table: Table, source: str, column: str | None, id_column: str | None
    ) -> Iterator[Input | UnitEdge]:
        """The rows of a table, the ends of its row groups, and `"broken"` inputs for what of it cannot be read.

        Raises:
            NoImageColumnError, ValueError: see `nopad.embedding.inputs.tables.image_column`; or no column `id_column`.
            UnreachableSourceError: it cannot be reached.
        """
        try:
            table = self._sized(table)
            max_rows = max(MAX_ROWS, table.size())
            parts = self.request(Listing(table, source, column, id_column), lambda: self._parts(max_rows))
        except UnreachableFileError as error:
            raise unreachable_source(source, f"cannot be reached now: {error}", error) from error
        except UnreadableError as error:
            parts = [Broken(as_text(os.path.basename(table.path)), f"cannot be listed: {error}")]
        if isinstance(parts, ValueError):
            raise parts
        for part in parts:
            if isinstance(part, Broken):
                yield Input(part.name, source, "broken", table.path, note=part.reason)
                continue
            split = part.note.split("/", 1)[0] if table.kind == "dataset" else ""
            numbers = range(part.first, part.first + part.count)
            for row, name in zip(numbers, chain(part.names, repeat("")), strict=False):
                id = f"{split}/{name or row}" if split else name or str(row)
                yield Input(id, source, table.kind, table.path, row, 0, part.note)
            if part.ends_group:
                yield UnitEdge.END

    def _parts(self, max_rows: int) -> list[Rows | Broken] | ValueError:
        parts: list[Rows | Broken] = []
        while "end" not in (answer := self._receive()):
            if "refused" in answer:
                return (NoImageColumnError if answer["no_images"] else ValueError)(text_in(answer, "refused"))
            parts.append(_part(answer, max_rows))
        return parts

    def schema(self, table: Table) -> pa.Schema:
        """The columns of a table.

        Raises:
            UnreadableError: they cannot be read.
        """

        def received() -> pa.Schema:
            data = self.receive_bytes(count_in(self._receive(), "bytes"), _MAX_SCHEMA_BYTES)
            try:
                return pa.ipc.read_schema(pa.py_buffer(data))
            except pa.ArrowException as error:
                raise ValueError(f"got no schema: {error}") from error

        return self.request(Schema(self._sized(table)), received)

    def values(self, table: Table, columns: tuple[str, ...], rows: tuple[int, ...]) -> list[Scalars]:
        """The values of each column in some rows, `None` for null and for what cannot be read.

        Raises:
            LostProcessError: the process did not survive them.
        """
        table = self._sized(table)
        max_bytes = table.max_bytes()

        def received() -> list[Scalars]:
            values: list[Scalars] = [[] for _ in columns]
            done, left = 0, max_bytes
            while done < len(rows):
                answer = self._receive()
                count, size = count_in(answer, "rows"), count_in(answer, "bytes")
                if not 0 < count <= len(rows) - done:
                    raise ValueError(f"got {count} rows of {len(rows) - done}")
                batch = _scalars(self.receive_bytes(size, left), len(columns), count)
                for column, more in zip(values, batch, strict=True):
                    column += more
                done, left = done + count, left - size
            return values

        return self.request(Values(table, columns, rows), received)

    def images(self, request: Cells) -> list[bytes] | int | str | None:
        """Images of rows that follow each other; or of the first its size if it is large, its path, or nothing.

        Raises:
            UnreadableError: the first cannot be read.
        """

        def received() -> list[bytes] | int | str | None:
            answer = self._receive()
            if "null" in answer:
                return None
            if "path" in answer:
                return name_in(answer, "path")
            if "large" in answer:
                return count_in(answer, "large")
            sizes = answer["sizes"]
            if not 0 < len(sizes) <= request.count:
                raise ValueError(f"got {len(sizes)} images, expected at most {request.count}")
            return [bytes(self.receive_bytes(checked_count(size), MAX_BYTES)) for size in sizes]

        return self.request(replace(request, table=self._sized(request.table)), received)

    def fetch(self, start: int, stop: int) -> bytes:
        """See `RequestProcess.fetch`: of the table that was requested last."""
        return self._reached(lambda: objects.read_range(self._address, start, stop, self.timeout))

    def _sized(self, table: Table) -> Table:
        """The same table with its size, where it is an object; its bytes can then be fetched.

        Raises:
            UnreadableError: it cannot be reached, or read.
        """
        if not scheme_of(table.path):
            self._address = b""
            return table
        self._address = table.path
        try:
            blocks = self._reached(lambda: objects.blocks_of(name_of(table.path), self.timeout))
        except OSError as error:
            raise UnreadableError(why(error)) from error
        return replace(table, num_bytes=blocks.size)

    def _reached(self, read: Callable[[], Result]) -> Result:
        try:
            return retry(read, is_unreachable, self.timeout)
        except OSError as error:
            if is_unreachable(error):
                raise UnreachableFileError(why(error)) from error
            raise

    def _receive(self) -> dict[str, Any]:
        return self.receive(self._set_reading)

    def _set_reading(self, rows: Any) -> None:
        start, stop = map(checked_count, rows)
        self.reading = start, stop


class TableImages:
    """The images of one table, in a process of its own; not for two threads at once, but for `interrupt`.

    Rows that were lost with the process are not tried again.
    """

    def __init__(self, table: Table, column: str, timeout: float | None) -> None:
        self._table = table
        self._column = column
        self._process = TableProcess(timeout)
        self._is_open = False
        self._ahead: dict[int, bytes] = {}
        self._next = -1
        self._lost: list[tuple[range, str]] = []

    def close(self) -> None:
        """See `TableProcess.close`."""
        self._process.close()

    def interrupt(self) -> None:
        """See `TableProcess.interrupt`."""
        self._process.interrupt()

    def image(self, row: int, *, takes_large: bool = False) -> bytes | str | int | None:
        """The bytes of a row's image, the path of its file, or nothing; of a large one the size, unless it is taken.

        Raises:
            UnreadableError: it cannot be read.
            ProcessServerError: see `TableProcess`.
        """
        follows, self._next = row == self._next, row + 1
        if (data := self._ahead.pop(row, None)) is not None:
            return data
        for rows, reason in self._lost:
            if row in rows:
                raise UnreadableError(reason)
        request = Cells(self._table, self._column, row, _MAX_AHEAD if follows else 1, takes_large)
        self._process.reading = (row, row + 1) if self._is_open else _EVERY_ROW
        try:
            images = self._process.images(request)
        except LostProcessError as error:
            start, stop = self._process.reading
            self._lost.append((range(start, stop) if stop > start else range(*_EVERY_ROW), str(error)))
            self._is_open = False
            raise
        self._is_open = True
        if not isinstance(images, list):
            return images
        self._ahead = dict(enumerate(images[1:], row + 1))
        return images[0]


def _part(answer: dict[str, Any], max_rows: int) -> Rows | Broken:
    if "reason" in answer:
        return Broken(text_in(answer, "name"), text_in(answer, "reason"))
    first, count, names = checked_count(answer["first"]), checked_count(answer["count"]), answer["names"]
    if count > max_rows or len(names) > count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"got {count} rows with {len(names)} names, expected at most {max_rows} rows")
    ends_group = answer["ends_group"] is True
    return Rows(first, count, text_in(answer, "note"), tuple(map(valid_text, names)), ends_group)


def _scalars(data: bytearray, num_columns: int, count: int) -> list[Scalars]:
    """The values in a stream of one batch, whose columns have the numbers of those that there are."""
    values: list[Scalars] = [[None] * count for _ in range(num_columns)]
    if data:
        try:
            batch = pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch()
            batch.validate(full=True)
        except pa.ArrowException as error:
            raise ValueError(f"got no batch: {error}") from error
        if len(batch) != count:
            raise ValueError(f"got a batch of {len(batch)} rows, expected {count}")
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values[int(name)] = [value if value.is_valid else None for value in column]
    return values

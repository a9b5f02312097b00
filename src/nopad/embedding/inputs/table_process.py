"""Tables listed and read in processes that can be ended, on the side of the job.

Arrow may wait, take memory without end or crash over a file that is damaged, or made for that.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any, TypeVar

import pyarrow as pa

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.names import as_text
from nopad.embedding.inputs.table_program import Cells, Listing, Schema, Table, TableProgram, Values
from nopad.embedding.inputs.tables import MAX_ROWS, Broken, NoImageColumnError, Rows
from nopad.pipeline import process_server
from nopad.pipeline.channel import Channel, checked_count, count_in, text_in, valid_text
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS, MAX_BYTES

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Scalars = list[pa.Scalar | None]

_MAX_ATTEMPTS, _MAX_LOST_SERVERS = 2, 5  # as of decode processes
_MAX_SCHEMA_BYTES = 1 << 24
_MAX_AHEAD = 64  # images that are sent together
_EVERY_ROW = 0, 1 << 63


class DamagedTableError(ValueError):
    """A table, or a value in it, that cannot be read."""


class LostTableError(DamagedTableError):
    """A table whose process crashed or took too long."""


class TableProcess:
    """A process that lists and reads tables, started when there is something to do.

    It serves one thread at a time; `interrupt` may be called from another.

    Args:
        timeout: seconds for what is read in one go, `None` for no limit.
    """

    def __init__(self, timeout: float | None = INPUT_TIMEOUT_SECONDS) -> None:
        self.timeout = timeout
        self.reading = _EVERY_ROW
        """The first row of those that were read last in one go, and the one behind the last of them."""
        self._lock = threading.Lock()  # a process is not killed once it is closed: its number may be another's
        self._channel: Channel | None = None
        self._is_interrupted = False

    def __enter__(self) -> TableProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            channel, self._channel = self._channel, None
            if channel is not None:
                channel.kill()
                channel.close()

    def interrupt(self) -> None:
        """End the process; nothing can be read from now on."""
        with self._lock:
            self._is_interrupted = True
            if self._channel is not None:
                self._channel.kill()

    def inputs(self, table: Table, source: str, column: str | None, id_column: str | None) -> Iterator[Input]:
        """The rows of a table, and `"broken"` inputs for what of it cannot be read.

        Raises:
            NoImageColumnError, ValueError: see `nopad.embedding.inputs.tables.image_column`; or no column `id_column`.
        """
        max_rows = max(MAX_ROWS, table.size())
        try:
            parts = self._ask(Listing(table, source, column, id_column), lambda: self._parts(max_rows))
        except DamagedTableError as error:
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
            DamagedTableError: they cannot be read.
        """

        def received() -> pa.Schema:
            size = count_in(self._receive(), "bytes")
            return pa.ipc.read_schema(pa.py_buffer(self._bytes(size, _MAX_SCHEMA_BYTES)))

        return self._ask(Schema(table), received)

    def values(self, table: Table, columns: tuple[str, ...], rows: tuple[int, ...]) -> list[Scalars]:
        """The values of each column in some rows, `None` for null and for what cannot be read.

        Raises:
            LostTableError: the process did not survive them.
        """
        max_bytes = table.max_bytes()

        def received() -> list[Scalars]:
            values: list[Scalars] = [[] for _ in columns]
            done, left = 0, max_bytes
            while done < len(rows):
                answer = self._receive()
                count, size = count_in(answer, "rows"), count_in(answer, "bytes")
                if not 0 < count <= len(rows) - done:
                    raise ValueError(f"got {count} rows of {len(rows) - done}")
                batch = _scalars(self._bytes(size, left), len(columns), count)
                for column, more in zip(values, batch, strict=True):
                    column += more
                done, left = done + count, left - size
            return values

        return self._ask(Values(table, columns, rows), received)

    def images(self, request: Cells) -> list[bytes] | int | str | None:
        """Images of rows that follow each other; or of the first its size if it is large, its path, or nothing.

        Raises:
            DamagedTableError: the first cannot be read.
        """

        def received() -> list[bytes] | int | str | None:
            answer = self._receive()
            if "null" in answer:
                return None
            if "path" in answer:
                os.fsencode(answer["path"])  # a text, of which the system can make bytes
                return answer["path"]
            if "large" in answer:
                return count_in(answer, "large")
            sizes = answer["sizes"]
            if not 0 < len(sizes) <= request.count:
                raise ValueError(f"got {len(sizes)} images, expected at most {request.count}")
            return [bytes(self._bytes(checked_count(size), MAX_BYTES)) for size in sizes]

        return self._ask(request, received)

    def _ask(self, request: Any, received: Callable[[], Result]) -> Result:
        """Send a request and receive the answer, again where the process died on the way.

        Raises:
            DamagedTableError: an answer that says so; or too much time, or a process that died again.
            ProcessServerError: no process can be started.
        """
        attempts = lost_servers = 0
        while attempts < _MAX_ATTEMPTS and lost_servers < _MAX_LOST_SERVERS:
            channel = self._start()
            try:
                channel.wait(channel.send(request), self.timeout)
                return received()
            except DamagedTableError:
                raise
            except TimeoutError:
                self.close()
                reason = f"reading it takes more than {self.timeout:g} s; input_timeout sets another limit"
                raise LostTableError(reason) from None
            except (EOFError, OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
                logger.info("a process that reads tables died: %s", error)
                if self._is_interrupted:
                    raise DamagedTableError("not read: the run has ended") from error
                if channel.has_lost_server:
                    lost_servers += 1
                else:
                    attempts += 1
                self.close()
            except BaseException:
                self.close()  # it is in the middle of an answer
                raise
        raise LostTableError("its reader crashed; a damaged file, or too little memory")

    def _start(self) -> Channel:
        if self._channel is None or not self._channel.is_idle():
            self.close()
            channel = Channel(process_server.fork(TableProgram()))
            with self._lock:
                self._channel = channel
                if self._is_interrupted:
                    channel.kill()
        return self._channel

    def _receive(self) -> dict[str, Any]:
        """An answer behind those that tell what is being read."""
        assert self._channel is not None
        while "reading" in (answer := self._channel.wait(self._channel.receive(), self.timeout)):
            start, stop = map(checked_count, answer["reading"])
            self.reading = start, stop
        if "traceback" in answer:
            logger.error("unexpected error in a reader of tables:\n%s", answer["traceback"])
        if "error" in answer:
            raise DamagedTableError(text_in(answer, "error"))
        return answer

    def _bytes(self, size: int, max_size: int) -> bytearray:
        """As many bytes as were announced.

        Raises:
            ValueError: more than `max_size`.
        """
        assert self._channel is not None
        if size > max_size:
            raise ValueError(f"got {size} bytes, expected at most {max_size}")
        data = bytearray(size)
        self._channel.wait(self._channel.fill(memoryview(data)), self.timeout)
        return data


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
            DamagedTableError: it cannot be read.
            ProcessServerError: see `TableProcess`.
        """
        follows, self._next = row == self._next, row + 1
        if (data := self._ahead.pop(row, None)) is not None:
            return data
        for rows, reason in self._lost:
            if row in rows:
                raise DamagedTableError(reason)
        request = Cells(self._table, self._column, row, _MAX_AHEAD if follows else 1, takes_large)
        self._process.reading = (row, row + 1) if self._is_open else _EVERY_ROW
        try:
            images = self._process.images(request)
        except LostTableError as error:
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
    return Rows(first, count, text_in(answer, "note"), tuple(map(valid_text, names)))


def _scalars(data: bytearray, num_columns: int, count: int) -> list[Scalars]:
    """The values in a stream of one batch, whose columns have the numbers of those that there are."""
    values: list[Scalars] = [[None] * count for _ in range(num_columns)]
    if data:
        batch = pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch()
        batch.validate(full=True)
        if len(batch) != count:
            raise ValueError(f"got a batch of {len(batch)} rows, expected {count}")
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values[int(name)] = [value if value.is_valid else None for value in column]
    return values

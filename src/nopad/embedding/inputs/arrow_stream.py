"""Arrow's stream format in a file: any record batch by itself, without mapping the file into memory.

A mapped file that is cut short while it is read, or lies on a disk that fails, ends the process. Arrow's own reader of
streams needs either a map or all batches in order.

Source: Apache Arrow, Columnar Format, "Encapsulated message format" and Message.fbs; FlatBuffers internals.
"""

from __future__ import annotations

import bisect
import os
import struct
from dataclasses import dataclass

import pyarrow as pa

from nopad.counts import counted
from nopad.preprocessing.files import open_regular, why
from nopad.preprocessing.reachable import is_unreachable

MAX_BATCH_BYTES = 1 << 31
"""Largest record batch that is read."""

MAX_ROWS = 1 << 20
"""Rows that a file may claim whatever its size; a larger one at most as many as it has bytes."""

_CONTINUES = 0xFFFFFFFF
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_DAMAGE = (OSError, ValueError, struct.error, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    rows: int
    start: int
    end: int


class ArrowStream:
    """The batches of a stream that are whole; `damage` describes what is wrong with the file, if anything.

    Raises:
        OSError: it cannot be reached.
    """

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._head: list[_Message] = []  # the schema, then the dictionaries
        self._batches: list[_Message] = []
        self._starts = [0]
        self.schema: pa.Schema | None = None
        self.damage = ""
        try:
            self._index()
        except _DAMAGE as error:
            if is_unreachable(error):
                raise
            self.damage = f"cannot be read, damaged? ({why(error)})"

    def __len__(self) -> int:
        return self._starts[-1]

    def rows_of_batch(self, row: int) -> tuple[int, int]:
        """The first row of the batch that a row is in, and the first behind it.

        Raises:
            IndexError: no such row.
        """
        number = self._number(row)
        return self._starts[number], self._starts[number + 1]

    def _number(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return bisect.bisect_right(self._starts, row) - 1

    def batch_of(self, row: int) -> tuple[int, pa.RecordBatch]:
        """The number of the batch's first row, and the batch.

        Raises:
            IndexError: no such row.
            OSError, ValueError, pa.ArrowException: the file has changed, or the batch is damaged or too large.
        """
        number = self._number(row)
        batch = self._batches[number]
        with open_regular(self._path) as file:
            parts = [_read(file.fileno(), message.start, message.end) for message in (*self._head, batch)]
        return self._starts[number], pa.ipc.open_stream(b"".join(parts)).read_next_batch()

    def _index(self) -> None:
        with open_regular(self._path) as file:
            size = os.fstat(file.fileno()).st_size
            position = 0
            while (message := _message(file.fileno(), position)) is not None:
                if message.end > size:
                    raise ValueError(f"truncated: a batch goes on to byte {message.end}, the file ends at {size}")
                position = message.end
                if message.kind == _BATCH:
                    self._batches.append(message)
                    self._starts.append(self._starts[-1] + message.rows)
                    if len(self) > max(MAX_ROWS, size):
                        claimed, self._starts = len(self), [0]
                        raise ValueError(f"it claims {counted(claimed, 'row')} in {counted(size, 'byte')}")
                    continue
                self._head.append(message)
                if message.kind == _SCHEMA:
                    schema = pa.ipc.read_schema(pa.py_buffer(_read(file.fileno(), 0, message.end)))
                    _ = schema.names  # may be no text
                    self.schema = schema


def _message(file: int, position: int) -> _Message | None:
    """The message that begins at a byte, `None` at the end mark or the end of the file."""
    head = os.pread(file, 8, position)
    if not head:
        return None
    continues, length = struct.unpack("<II", head)
    if continues != _CONTINUES:
        raise ValueError(f"no Arrow message at byte {position}")
    if not length:
        return None
    metadata = _read(file, position + 8, position + 8 + min(length, MAX_BATCH_BYTES))
    table = _Table(metadata, struct.unpack_from("<I", metadata)[0])
    kind = table.number(1, "<B")
    rows = table.child(2).number(0, "<q") if kind == _BATCH else 0
    body = table.number(3, "<q")
    if kind not in (_SCHEMA, _DICTIONARY, _BATCH) or body < 0 or rows < 0:
        raise ValueError(f"no Arrow message at byte {position}")
    return _Message(kind, rows, position, position + 8 + length + body)


class _Table:
    """A table of a FlatBuffer: its fields by number."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data = data
        self._place = place
        self._fields = place - struct.unpack_from("<i", data, place)[0]

    def _offset(self, field: int) -> int:
        at = 4 + 2 * field
        if self._fields < 0 or at >= struct.unpack_from("<H", self._data, self._fields)[0]:
            return 0
        return struct.unpack_from("<H", self._data, self._fields + at)[0]

    def number(self, field: int, format: str) -> int:
        offset = self._offset(field)
        return struct.unpack_from(format, self._data, self._place + offset)[0] if offset else 0

    def child(self, field: int) -> _Table:
        place = self._place + self._offset(field)
        return _Table(self._data, place + struct.unpack_from("<I", self._data, place)[0])


def _read(file: int, start: int, end: int) -> bytes:
    if end - start > MAX_BATCH_BYTES:
        raise ValueError(f"a batch of {end - start} bytes, expected at most {MAX_BATCH_BYTES}; save it in smaller ones")
    parts = []
    while start < end and (part := os.pread(file, end - start, start)):
        parts.append(part)
        start += len(part)
    if start < end:
        raise ValueError(f"truncated: it goes on to byte {end}, the file ends at {start}")
    return b"".join(parts)

"""The connection to one decode process: what is sent and received, without waiting."""

from __future__ import annotations

import json
import os
import selectors
import signal
import struct
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.memory import Reservation

MEMORY = 0
"""Beside `selectors.EVENT_READ` and `EVENT_WRITE`: waits for memory."""

Answer = PreparedImage | dict[str, Any]
"""An image, or what went wrong, as the `"error"` and perhaps the `"traceback"`."""

_MAX_ANSWER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_MAX_INT = 2**31 - 1


class DecodeChannel:
    """One process, which decodes one file after another.

    Args:
        connection: to the process, which reads it with `Connection.recv`.
        pid: its number.
        dtype: of the patches that it sends.
    """

    def __init__(self, connection: Connection, pid: int, dtype: torch.dtype) -> None:
        self.connection = connection
        self.pid = pid
        self.dtype = dtype
        self.deadline = float("inf")  # by the monotonic clock
        self._received = b""
        self._start = self._waited = 0.0
        os.set_blocking(connection.fileno(), False)

    def fileno(self) -> int:
        """For selectors."""
        return self.connection.fileno()

    def prepare(
        self, data: Any, reservation: Reservation, timeout: float | None, notify: Callable[[], None]
    ) -> Generator[int, None, Answer]:
        """Send a file and receive its patches; yields what it waits for, whenever it has to, and is resumed then.

        Args:
            data: the file, as the decoder takes it.
            reservation: of the memory that it takes.
            timeout: seconds until `deadline`, which starts anew once there is memory and once patches come.
            notify: called when there may be memory.

        Raises:
            EOFError, OSError, ValueError, LookupError, TypeError: the process died, or answers nonsense.
            ImageError: no memory for it.
        """
        self._start, self._waited = time.monotonic(), 0.0
        self._allow(timeout)
        yield from self._send(data)
        answer = yield from self._receive()
        if "error" in answer:
            return answer
        size = int(answer["bytes"])
        yield from self._reserve(size, reservation, notify)
        yield from self._send(size)
        answer = yield from self._receive()
        if "error" in answer:
            return answer
        rows, columns = answer["shape"]
        if not 0 < rows * columns * self.dtype.itemsize <= size:
            raise EOFError(f"got patches of {rows}×{columns}, expected at most {size} bytes")
        patches = torch.empty(rows, columns, dtype=self.dtype)
        self._allow(timeout)
        yield from self._fill(patches.view(-1).view(torch.uint8).numpy().data)
        t, h, w = answer["grid"]
        return PreparedImage(patches, (t, h, w), answer["width"], answer["height"])

    def seconds(self) -> float:
        """For how long the process has worked on its file until now, without waiting for memory."""
        return time.monotonic() - self._start - self._waited

    def kill(self) -> None:
        """End the process; its connection stays open, so that this is seen as its end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the connection, with which the process ends if it has not yet."""
        self.connection.close()

    def _allow(self, seconds: float | None) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds

    def _reserve(self, size: int, reservation: Reservation, notify: Callable[[], None]) -> Generator[int, None, None]:
        start = time.monotonic()
        while not reservation.try_reserve(size, notify):
            yield MEMORY
        self._waited = time.monotonic() - start
        self.deadline += self._waited

    def _send(self, message: Any) -> Generator[int, None, None]:
        """Send a pickle as `Connection.recv` expects it."""
        payload = ForkingPickler.dumps(message)
        size = len(payload)
        header = struct.pack("!i", size) if size <= _MAX_INT else struct.pack("!iQ", -1, size)
        parts = [b"".join((header, payload))] if size < _CHUNK_BYTES else [header, payload]
        for part in map(memoryview, parts):
            while part.nbytes:
                try:
                    part = part[os.write(self.fileno(), part) :]
                except BlockingIOError:
                    yield selectors.EVENT_WRITE

    def _receive(self) -> Generator[int, None, dict[str, Any]]:
        """An answer as JSON: a decoder that was taken over must not reach this process, as a pickle could."""
        while (answer := self._take_answer()) is None:
            yield selectors.EVENT_READ
            with suppress(BlockingIOError):
                received = os.read(self.fileno(), _CHUNK_BYTES)
                if not received:
                    raise EOFError("got no answer")
                self._received += received
        return json.loads(answer)

    def _take_answer(self) -> bytes | None:
        if len(self._received) < 4:
            return None
        (size,) = struct.unpack_from("!i", self._received)
        if not 0 <= size <= _MAX_ANSWER_BYTES:
            raise ValueError(f"got an answer of {size} bytes, expected at most {_MAX_ANSWER_BYTES}")
        end = 4 + size
        if len(self._received) < end:
            return None
        answer, self._received = self._received[4:end], self._received[end:]
        return answer

    def _fill(self, buffer: memoryview) -> Generator[int, None, None]:
        """Fill a buffer with plain bytes, the first of which may have come with the answer before."""
        done = min(len(self._received), buffer.nbytes)
        buffer[:done] = self._received[:done]
        if len(self._received) > done:
            raise ValueError("got more patches than announced")
        self._received = b""
        while done < buffer.nbytes:
            yield selectors.EVENT_READ
            with suppress(BlockingIOError):
                received = os.readv(self.fileno(), [buffer[done:]])
                if not received:
                    raise EOFError("got fewer patches than announced")
                done += received

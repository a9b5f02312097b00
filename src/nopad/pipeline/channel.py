"""The connection to a process that is not trusted: what is sent and received, without waiting."""

from __future__ import annotations

import json
import os
import select
import selectors
import struct
from collections.abc import Generator
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any

from nopad.pipeline.process_server import Process

_MAX_ANSWER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_MAX_INT = 2**31 - 1


class Channel:
    """Sends pickles, which the process reads with `Connection.recv`, and receives JSON and plain bytes.

    Its methods yield `selectors.EVENT_READ` or `EVENT_WRITE` where they have to wait for that, and are resumed then.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._received = b""
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """For selectors."""
        return self._process.connection.fileno()

    @property
    def has_lost_server(self) -> bool:
        """See `Process.has_lost_server`."""
        return self._process.has_lost_server

    def kill(self) -> None:
        """See `Process.kill`."""
        self._process.kill()

    def close(self) -> None:
        """See `Process.close`."""
        self._process.close()

    def is_idle(self) -> bool:
        """Whether the process waits for a request: it has not ended, and has sent nothing beyond its answers."""
        poll = select.poll()
        poll.register(self, select.POLLIN)
        return not self._received and not poll.poll(0)

    def send(self, message: Any) -> Generator[int, None, None]:
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

    def receive(self) -> Generator[int, None, dict[str, Any]]:
        """An answer as JSON: a decoder that was taken over must not reach this process, as a pickle could.

        Raises:
            EOFError, OSError, ValueError, TypeError: the process died, or answers nonsense.
        """
        while (answer := self._take_answer()) is None:
            yield selectors.EVENT_READ
            with suppress(BlockingIOError):
                received = os.read(self.fileno(), _CHUNK_BYTES)
                if not received:
                    raise EOFError("got no answer")
                self._received += received
        fields = json.loads(answer)
        if not isinstance(fields, dict):
            raise TypeError(f"expected fields, got {type(fields).__name__}")
        return fields

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

    def fill(self, buffer: memoryview) -> Generator[int, None, None]:
        """Fill a buffer with plain bytes, the first of which may have come with the answer before.

        Raises:
            EOFError, OSError, ValueError: the process died, or sent more.
        """
        done = min(len(self._received), buffer.nbytes)
        buffer[:done] = self._received[:done]
        if len(self._received) > done:
            raise ValueError("got more bytes than announced")
        self._received = b""
        while done < buffer.nbytes:
            yield selectors.EVENT_READ
            with suppress(BlockingIOError):
                received = os.readv(self.fileno(), [buffer[done:]])
                if not received:
                    raise EOFError("got fewer bytes than announced")
                done += received


def count_in(answer: dict[str, Any], key: str) -> int:
    """A count of bytes in an answer.

    Raises:
        LookupError, TypeError, ValueError: none.
    """
    count = answer[key]
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"{key}: expected a number of bytes, got {count!r:.80}")
    return count

"""The connection to a process that is not trusted: what is sent and received, without waiting."""

from __future__ import annotations

import json
import os
import pickle
import select
import selectors
import struct
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from nopad.local_paths import utf8
from nopad.pipeline.process_server import Process

_MAX_ANSWER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16
_MAX_INT = 2**31 - 1
_MAX_BUFFERS = 256  # of one read; the system takes up to 1,024

MAX_PATIENCE = 3600.0
"""Seconds of one wait; the system takes no more than about 2**31 milliseconds."""

Result = TypeVar("Result")


class Channel:
    """Sends pickles, which the process reads with `Connection.recv`, and receives JSON and plain bytes.

    Its methods yield `selectors.EVENT_READ` or `EVENT_WRITE` where they have to wait for that, and are resumed then.
    """

    def __init__(self, process: Process) -> None:
        self._process = process
        self._received = b""
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """The connection's file descriptor, for selectors."""
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
        payload = pickle.dumps(message)
        size = len(payload)
        header = struct.pack("!i", size) if size <= _MAX_INT else struct.pack("!iQ", -1, size)
        parts = [b"".join((header, payload))] if size < _CHUNK_BYTES else [header, payload]
        for part in map(memoryview, parts):
            while part.nbytes:
                try:
                    part = part[os.write(self.fileno(), part) :]
                except BlockingIOError:
                    yield selectors.EVENT_WRITE

    def receive(self, max_answers: int = 1) -> Generator[int, None, dict[str, Any]]:
        """An answer as JSON: a decoder that was taken over must not reach this process, as a pickle could.

        Args:
            max_answers: maximum number of files that it may answer for.

        Raises:
            EOFError, OSError, ValueError, TypeError: the process died, or answers nonsense.
        """
        while (answer := self._take_answer(max_answers * _MAX_ANSWER_BYTES)) is None:
            yield selectors.EVENT_READ
            with suppress(BlockingIOError):
                received = os.read(self.fileno(), _CHUNK_BYTES)
                if not received:
                    raise EOFError("got no answer")
                self._received += received
        fields = json.loads(answer.decode())
        if not isinstance(fields, dict):
            raise TypeError(f"expected fields, got {type(fields).__name__}")
        return fields

    def _take_answer(self, max_bytes: int) -> bytes | None:
        if len(self._received) < 4:
            return None
        (size,) = struct.unpack_from("!i", self._received)
        if not 0 <= size <= max_bytes:
            raise ValueError(f"got an answer of {size} bytes, expected at most {max_bytes}")
        end = 4 + size
        if len(self._received) < end:
            return None
        answer, self._received = self._received[4:end], self._received[end:]
        return answer

    def fill(self, buffers: Sequence[memoryview]) -> Generator[int, None, None]:
        """Fill buffers with plain bytes, the first of which may have come with the answer before.

        Raises:
            EOFError, OSError: the process died.
        """
        received, self._received = memoryview(self._received), b""
        rest = [buffer for buffer in buffers if buffer.nbytes]
        while rest:
            if received.nbytes:
                count = min(received.nbytes, rest[0].nbytes)
                rest[0][:count] = received[:count]
                received = received[count:]
            else:
                try:
                    count = os.readv(self.fileno(), rest[:_MAX_BUFFERS])
                except BlockingIOError:
                    yield selectors.EVENT_READ
                    continue
                if not count:
                    raise EOFError("got fewer bytes than announced")
            while rest and count >= rest[0].nbytes:
                count -= rest.pop(0).nbytes
            if rest:
                rest[0] = rest[0][count:]
        self._received = bytes(received)

    def wait(self, steps: Generator[int, None, Result], timeout: float | None) -> Result:
        """Go on with what one of these methods does until it is done, for so many seconds at most.

        Raises:
            TimeoutError: it is not done then.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        while True:
            try:
                events = next(steps)
            except StopIteration as stop:
                return stop.value
            poll.register(self, select.POLLIN if events == selectors.EVENT_READ else select.POLLOUT)
            while not poll.poll(1000 * min(max(0.0, end - time.monotonic()), MAX_PATIENCE)):
                if time.monotonic() >= end:
                    raise TimeoutError(f"no answer after {timeout} s")


def valid_text(text: str) -> str:
    """A text without the halves of characters that JSON lets it have."""
    return text.encode("utf-8", "backslashreplace").decode()


def text_in(answer: dict[str, Any], key: str) -> str:
    """A text in an answer.

    Raises:
        LookupError, TypeError: none.
    """
    if not isinstance(text := answer[key], str):
        raise TypeError(f"{key}: expected a text, got {text!r:.80}")
    return valid_text(text)


def name_in(answer: dict[str, Any], key: str) -> str:
    """A file's name in an answer.

    Raises:
        LookupError, TypeError, ValueError: none, or one of which no bytes can be made.
    """
    if not isinstance(name := answer[key], str):
        raise TypeError(f"{key}: expected a name, got {name!r:.80}")
    utf8(name)
    return name


def count_in(answer: dict[str, Any], key: str) -> int:
    """A count in an answer.

    Raises:
        LookupError, ValueError: none.
    """
    return checked_count(answer[key])


def checked_count(count: Any) -> int:
    """A count as it was sent.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"expected a count, got {count!r:.80}")
    return count

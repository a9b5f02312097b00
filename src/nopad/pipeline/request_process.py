"""Processes that read untrusted files by requests, one at a time, and can be ended.

Requests are pickled, answers are JSON and plain bytes; see `nopad.pipeline.channel`.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from nopad.pipeline import process_server
from nopad.pipeline.channel import Channel, checked_count, text_in
from nopad.pipeline.forked import HEADROOM_BYTES, Program, address_space, answer, limit_address_space
from nopad.pipeline.process_server import Attempts
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PROGRESS, FETCH = "progress", "fetch"
"""Keys of answers that are none yet: it takes time, which begins anew; or it needs bytes of an object, in a range."""

MAX_FETCH_BYTES = 1 << 25
"""Bytes that a process fetches at once."""

MAX_REASON = 1000
"""Characters of a reason."""

_NONSENSE = (EOFError, OSError, ValueError, LookupError, TypeError)


class UnreadableError(ValueError):
    """What was requested cannot be read, and why."""


class UnreachableFileError(UnreadableError):
    """What was requested cannot be reached now, and why."""


class LostProcessError(UnreadableError):
    """The process that reads crashed or took too long."""


class RequestProcess:
    """A process that answers requests, started with the first.

    It serves one thread at a time; `interrupt` may be called from another.

    Args:
        program: what it does, see `serve_requests`.
        timeout: seconds for what is done in one go, `None` for no limit.
    """

    def __init__(self, program: Program, timeout: float | None = INPUT_TIMEOUT_SECONDS) -> None:
        self.timeout = timeout
        self._program = program
        self._lock = threading.Lock()  # a process is not killed once it is closed: its number may be another's
        self._channel: Channel | None = None
        self.is_interrupted = False

    def close(self) -> None:
        """End the process."""
        with self._lock:
            channel, self._channel = self._channel, None
            if channel is not None:
                channel.kill()
                channel.close()

    def interrupt(self) -> None:
        """End the process; from now on it answers nothing."""
        with self._lock:
            self.is_interrupted = True
            if self._channel is not None:
                self._channel.kill()

    def request(self, request: Any, received: Callable[[], Result]) -> Result:
        """Send a request, and return what `received` makes of the answer; once more where the process died on the way.

        Args:
            received: calls `receive` and `receive_bytes`; raises `EOFError`, `OSError`, `ValueError`, `LookupError` or
                `TypeError` for nonsense.

        Raises:
            UnreachableFileError: the process answers that, or what it fetches cannot be reached.
            UnreadableError: the process answers that; or it takes too long, dies again, or was interrupted.
            ProcessServerError: no process can be started.
        """
        attempts, may_try = Attempts(), True
        while may_try:
            channel = self._start()
            try:
                channel.wait(channel.send(request), self.timeout)
                return received()
            except UnreadableError:
                raise
            except TimeoutError:
                self.close()
                reason = f"reading it takes more than {self.timeout:g} s; input_timeout sets another limit"
                raise LostProcessError(reason) from None
            except _NONSENSE as error:
                logger.info("a process that reads died: %s", error)
                if self.is_interrupted:
                    raise UnreadableError("not read: the run has ended") from error
                may_try = attempts.count(has_lost_server=channel.has_lost_server)
                self.close()
            except BaseException:
                self.close()  # it is in the middle of an answer
                raise
        raise LostProcessError("its reader crashed; a damaged file, or too little memory")

    def receive(self, progress: Callable[[Any], None] = lambda _: None) -> dict[str, Any]:
        """An answer; `progress` gets what comes before it."""
        assert self._channel is not None
        while True:
            fields = self._channel.wait(self._channel.receive(), self.timeout)
            if FETCH in fields:
                self._send_fetched(self._channel, *map(checked_count, fields[FETCH]))
            elif PROGRESS in fields:
                progress(fields[PROGRESS])
            else:
                break
        if "traceback" in fields:
            logger.error("unexpected error in a process that reads:\n%s", fields["traceback"])
        if "error" in fields:
            kind = UnreachableFileError if fields.get("unreachable") is True else UnreadableError
            raise kind(text_in(fields, "error"))
        return fields

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes of a range of the object that is read, for a process that has no network itself.

        Raises:
            UnreachableFileError: it cannot be reached.
            OSError: it cannot be read.
        """
        raise OSError("there is nothing to fetch")

    def _send_fetched(self, channel: Channel, start: int, stop: int) -> None:
        if not start <= stop <= start + MAX_FETCH_BYTES:
            raise ValueError(f"got a request for the bytes {start} to {stop}, expected at most {MAX_FETCH_BYTES}")
        try:
            data: bytes | str = self.fetch(start, stop)
        except UnreachableFileError:
            self.close()  # it waits for them
            raise
        except OSError as error:
            data = str(error.strerror or error)
        channel.wait(channel.send(data), self.timeout)

    def receive_bytes(self, size: int, max_size: int) -> bytearray:
        """As many bytes as were announced.

        Raises:
            ValueError: more than `max_size`.
        """
        assert self._channel is not None
        if size > max_size:
            raise ValueError(f"got {size} bytes, expected at most {max_size}")
        data = bytearray(size)
        self._channel.wait(self._channel.fill([memoryview(data)]), self.timeout)
        return data

    def _start(self) -> Channel:
        channel = self._channel
        if channel is None or not channel.is_idle():
            self.close()
            channel = Channel(process_server.fork(self._program))
            with self._lock:
                self._channel = channel
                if self.is_interrupted:
                    channel.kill()
        return channel


def serve_requests(
    connection: Connection,
    answers: Mapping[type, Callable[[Connection, Any], None]],
    memory: Callable[[Any], int],
    damage: tuple[type[Exception], ...],
    why_unreachable: Callable[[Any, BaseException], str] = lambda request, error: "",
) -> None:
    """Answer requests one after another, by their type.

    Args:
        memory: bytes that a request may take beyond `HEADROOM_BYTES`.
        damage: what is raised over a file that cannot be read.
        why_unreachable: of a request and such an error, why the file cannot be reached; empty where it is damaged.
    """
    start = address_space()
    request = None
    while True:
        limit_address_space(start + HEADROOM_BYTES)
        try:
            request = connection.recv()
            limit_address_space(start + HEADROOM_BYTES + memory(request))
            answers[type(request)](connection, request)
        except (EOFError, ConnectionError):
            return
        except MemoryError:
            answer(connection, error="reading it takes more memory than a file of this size may")
        except damage as error:
            reason = str(getattr(error, "strerror", None) or error)[:MAX_REASON]
            unreachable = why_unreachable(request, error)
            answer(connection, error=unreachable or reason, unreachable=bool(unreachable))
        except Exception as error:
            summary = f"unexpected {type(error).__name__}: {error}"
            answer(connection, error=summary[:MAX_REASON], traceback=traceback.format_exc()[-10_000:])

"""Decoding in processes that can be ended: the side of the pipeline."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from nopad.pipeline import process_server
from nopad.pipeline.decode_process import Decoder
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.pipeline.memory import Reservation
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 1 << 20
_MAX_ATTEMPTS = 2  # a process may die without a fault of its input, for example of too little memory


class DecodeProcesses:
    """Processes that decode and prepare one file at a time; used by many threads, a process each.

    A process that takes too long or dies is replaced, and its input fails. Idle ones end with this object, all with
    this process, however it ends. Ctrl-C does not reach them.

    Args:
        decoder: from a file to pixels.
        image_processor: from pixels to patches.
        timeout: seconds for one input, `None` for no limit. Waiting for memory does not count.
    """

    def __init__(
        self, decoder: Decoder, image_processor: ImageProcessor, *, timeout: float | None = INPUT_TIMEOUT_SECONDS
    ) -> None:
        self.timeout = timeout
        self._setup = decoder, image_processor
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        process_server.start()

    def prepare(self, data: Any, reservation: Reservation) -> PreparedImage:
        """Decode and prepare a file in one of the processes.

        Raises:
            ImageError: what the decoder raised, too much time or memory, or a process that died of it.
            ProcessServerError: no process can be started.
        """
        for _ in range(_MAX_ATTEMPTS):
            with self._lock:
                if reservation.is_closed:  # checked under the lock that `interrupt` takes
                    raise ImageError("image", "not decoded: the run has ended")
                process = self._idle.pop() if self._idle else self._fork()
                self._busy.add(process)
            try:
                answer = process.prepare(data, reservation, self.timeout)
            except TimeoutError as error:
                process.kill()
                reason = f"decoding it takes more than {self.timeout:g} s; input_timeout sets another limit"
                raise ImageError("image", reason) from error
            except ImageError:
                process.kill()  # it waits for memory that will not come
                raise
            except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
                process.connection.close()  # it has died, and its number may be another's by now, or it ends
                if reservation.is_closed:
                    break
                logger.info("a decode process died: %s", error)
                continue
            except BaseException:
                process.kill()  # it waits for an answer that will not come
                raise
            finally:
                with self._lock:
                    self._busy.discard(process)
            with self._lock:
                self._idle.append(process)
            if isinstance(answer, PreparedImage):
                return answer
            if "traceback" in answer:
                logger.error("unexpected error in a decoder:\n%s", answer["traceback"])
            raise ImageError("image", str(answer["error"]))
        reason = "its decoder crashed; a damaged file, or too little memory"
        raise ImageError("image", reason)

    def interrupt(self) -> None:
        """End the processes that are decoding; their results are not needed."""
        with self._lock:
            for process in self._busy:
                process.kill()

    def _fork(self) -> _Process:
        connection, pid = process_server.start().fork(self._setup)
        return _Process(connection, pid, self._setup[1].dtype)


class _Process:
    def __init__(self, connection: Connection, pid: int, dtype: torch.dtype) -> None:
        self.connection = connection
        self.pid = pid
        self.dtype = dtype
        self.events = select.poll()  # `Connection.poll` makes one for each call
        self.events.register(connection.fileno(), select.POLLIN)

    def prepare(self, data: Any, reservation: Reservation, timeout: float | None) -> PreparedImage | dict[str, Any]:
        """Send a file and receive its patches, or the answer with an `"error"`.

        Raises:
            TimeoutError: no answer in time.
            EOFError, OSError, ValueError: the process died, or answers nonsense.
            ImageError: no memory for it.
        """
        self.connection.send(data)
        start = time.monotonic()
        answer = self.receive(timeout)
        if "error" in answer:
            return answer
        left = None if timeout is None else timeout - (time.monotonic() - start)
        size = int(answer["bytes"])
        reservation.reserve(size)
        self.connection.send(size)
        answer = self.receive(left)
        if "error" in answer:
            return answer
        rows, columns = answer["shape"]
        if not 0 < rows * columns * self.dtype.itemsize <= size:
            raise EOFError(f"got patches of {rows}×{columns}, expected at most {size} bytes")
        patches = torch.empty(rows, columns, dtype=self.dtype)
        self.receive_into(patches.view(-1).view(torch.uint8).numpy().data, timeout)
        t, h, w = answer["grid"]
        return PreparedImage(patches, (t, h, w), answer["width"], answer["height"])

    def receive(self, timeout: float | None) -> dict[str, Any]:
        """An answer as JSON: a decoder that was taken over must not reach this process, as a pickle could."""
        self.wait(timeout)
        return json.loads(self.connection.recv_bytes(_MAX_ANSWER_BYTES))

    def receive_into(self, buffer: memoryview, timeout: float | None) -> None:
        """Fill a buffer with plain bytes, without the copy in between that `Connection.recv_bytes_into` makes."""
        done = 0
        while done < buffer.nbytes:
            self.wait(timeout)
            received = os.readv(self.connection.fileno(), [buffer[done:]])
            if not received:
                raise EOFError("got fewer patches than announced")
            done += received

    def wait(self, timeout: float | None) -> None:
        """Wait until there is something to receive, or the process has ended.

        Raises:
            TimeoutError: nothing in so many seconds.
        """
        if not self.events.poll(None if timeout is None else max(timeout, 0) * 1000):
            raise TimeoutError

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

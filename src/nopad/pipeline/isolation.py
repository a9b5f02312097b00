"""Decoding in processes that can be ended: the side of the pipeline.

One thread serves all processes and never waits for one of them. A thread for each would be simpler, but dozens of
threads that wake up for every message take turns at the interpreter's lock with the one that feeds the encoder.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from nopad.pipeline import process_server
from nopad.pipeline.decode_channel import NO_EVENTS, Answer, DecodeChannel
from nopad.pipeline.decode_process import DecodeProgram, Decoder
from nopad.pipeline.decode_queue import DecodeQueue, Done, Task
from nopad.pipeline.decode_work import DecodeWork
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.pipeline.memory import MemoryReservation
from nopad.pipeline.wakeable_selector import WakeableSelector
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

_FOR_EVER = 1e9  # seconds


class DecodeProcesses:
    """Processes that decode and prepare files, one at a time or a few quick ones in a batch.

    A process that takes too long or dies is replaced, and its input fails; those of a batch are tried again one by one.
    Idle processes end with this object, all with this process, however it ends. Ctrl-C does not reach them.

    Args:
        decoder: makes pixels of a file.
        image_processor: makes patches of pixels.
        max_processes: maximum number of processes at once.
        timeout: seconds for one input, `None` for no limit. Waiting for memory does not count.
        keep_jpegs, scale_jpegs: see `DecodeProgram`.

    Raises:
        ValueError: a timeout that is no positive number.
    """

    def __init__(
        self,
        decoder: Decoder,
        image_processor: ImageProcessor,
        *,
        max_processes: int = 1,
        timeout: float | None = INPUT_TIMEOUT_SECONDS,
        keep_jpegs: bool = False,
        scale_jpegs: bool = False,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: expected seconds > 0 or None, got {timeout}")
        self.timeout = None if timeout is None or timeout > _FOR_EVER else timeout
        self.max_processes = max_processes
        self._program = DecodeProgram(decoder, image_processor, keep_jpegs, scale_jpegs)
        self._lock = threading.Lock()
        self._queue = DecodeQueue()
        self._idle: list[DecodeChannel] = []
        self._busy: dict[DecodeChannel, DecodeWork] = {}
        self._is_served = False
        self._selector = WakeableSelector()
        process_server.start()

    def start(self) -> None:
        """Start all processes, in a thread, so that the first files find them."""
        threading.Thread(target=self._start_all, name="nopad-start", daemon=True).start()

    def _start_all(self) -> None:
        with suppress(OSError):  # a file that needs a process has the reason
            for _ in range(self.max_processes):
                process = self._fork()
                with self._lock:
                    if len(self._idle) + len(self._busy) >= self.max_processes:
                        process.close()
                        return
                    self._idle.append(process)

    def submit(self, data: Any, reservation: MemoryReservation, done: Done) -> None:
        """Decode and prepare a file in one of the processes.

        `done` is called from another thread: with the image; with an `ImageError`, which is what the decoder raised,
        too much time or memory, or a process that died of it; or with `ProcessServerError`, no process can be started.
        """
        task = Task(data, reservation, done, alone=not self._program.decoder.is_quick(data))
        with self._lock:
            self._queue.append(task)
            if not self._is_served:
                self._is_served = True
                threading.Thread(target=self._serve, name="nopad-decode", daemon=True).start()
            is_full = len(self._busy) >= self.max_processes
        if not is_full:  # else it is begun once a process is idle
            self._selector.wake()

    def prepare(self, data: Any, reservation: MemoryReservation) -> PreparedImage:
        """Decode and prepare a file, and wait for it.

        Raises:
            ImageError, ProcessServerError: see `submit`.
        """
        future: Future[PreparedImage] = Future()

        def done(outcome: PreparedImage | Exception, _: float) -> None:
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self.submit(data, reservation, done)
        return future.result()

    def interrupt(self) -> None:
        """End the processes that are decoding; their results are not needed."""
        with self._lock:
            for process in self._busy:
                process.kill()

    # All below runs in the thread that serves the processes.

    def _serve(self) -> None:
        try:
            while self._start():
                self._serve_once()
        except BaseException as error:  # every waiting task must end
            tasks = [task for work in list(self._busy.values()) for task in self._end(work)]
            with self._lock:
                tasks += self._queue.take_all()
                self._is_served = False
            for task in tasks:
                task.done(error if isinstance(error, Exception) else RuntimeError(repr(error)), 0.0)
            raise

    def _start(self) -> bool:
        """Give waiting files to idle processes, and start at most one process; whether there is something to do."""
        while True:
            with self._lock:
                if not self._queue:
                    self._is_served = bool(self._busy)
                    return self._is_served
                if len(self._busy) >= self.max_processes:
                    return True
                tasks = self._queue.take(self.max_processes)
                is_closed = tasks[0].reservation.is_closed  # checked under the lock that `interrupt` takes
                process = self._take_idle()
                if process is not None and not is_closed:
                    self._begin(process, tasks)
            if is_closed:
                if process is not None:
                    self._idle.append(process)
                for task in tasks:
                    task.done(ImageError("image", "not decoded: the run has ended"), 0.0)
            elif process is None:
                self._start_in_new_process(tasks)
                return True
            else:
                self._advance(self._busy[process])

    def _take_idle(self) -> DecodeChannel | None:
        while self._idle:
            process = self._idle.pop()
            if process.is_idle():
                return process
            process.close()
        return None

    def _start_in_new_process(self, tasks: list[Task]) -> None:
        try:
            process = self._fork()
        except Exception as error:
            for task in tasks:
                task.done(error, 0.0)
            return
        with self._lock:
            self._begin(process, tasks)
            if tasks[0].reservation.is_closed:
                process.kill()
        self._advance(self._busy[process])

    def _begin(self, process: DecodeChannel, tasks: list[Task]) -> None:
        options: dict[str, Any] = {"max_processes": self.max_processes, "notify": self._selector.wake}
        self._busy[process] = DecodeWork.begin(process, tasks, timeout=self.timeout, **options)

    def _serve_once(self) -> None:
        """Wait until a process can go on, and let all that can."""
        for work in self._selector.select(self._seconds_to_deadline()):
            self._advance(work)
        now = time.monotonic()
        for work in list(self._busy.values()):
            if work.waits_for_memory:
                self._advance(work)
            elif now >= work.process.deadline:
                self._fail(work, work.timeout_error())

    def _seconds_to_deadline(self) -> float | None:
        if self._queue and len(self._busy) < self.max_processes:
            return 0  # the next process is started
        times = [work.process.deadline for work in self._busy.values() if not work.waits_for_memory]
        first = min(times, default=float("inf"))
        return None if first == float("inf") else max(0.0, first - time.monotonic())

    def _advance(self, work: DecodeWork) -> None:
        """Let a process go on until it has to wait or its files are done."""
        try:
            self._wait_for(work, next(work.steps))
        except StopIteration as end:
            self._finish(work, end.value)
        except ImageError as error:
            self._fail(work, error)  # it waits for memory that will not come
        except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
            self._died(work, error)
        except Exception as error:
            self._fail(work, error)  # it waits for an answer that will not come

    def _wait_for(self, work: DecodeWork, events: int) -> None:
        if events == work.events:
            return
        if not work.waits_for_memory:
            self._selector.unregister(work.process)
        if events != NO_EVENTS:
            self._selector.register(work.process, events, work)
        work.events = events

    def _finish(self, work: DecodeWork, answers: list[Answer]) -> None:
        seconds = work.process.seconds() / len(answers)
        self._let_go(work)
        self._idle.append(work.process)
        self._try_alone(work.deliver(answers, seconds))

    def _died(self, work: DecodeWork, error: Exception) -> None:
        """The process has died, of its file or with its server, or it ends as its connection is closed."""
        task = work.tasks[0]
        may_try = not task.alone or task.attempts.count(has_lost_server=work.process.has_lost_server)
        if may_try and not task.reservation.is_closed:
            logger.info("a decode process died: %s", error)
            self._try_alone(self._end(work, kill=False))
        else:
            reason = "its decoder crashed; a damaged file, or too little memory"
            self._fail(work, ImageError("image", reason), kill=False)

    def _fail(self, work: DecodeWork, error: Exception, *, kill: bool = True) -> None:
        """End a process whose file fails; files of a batch are tried again, each alone."""
        tasks = self._end(work, kill=kill)
        if tasks[0].alone:
            tasks[0].done(error, work.process.seconds())
        else:
            self._try_alone(tasks)

    def _end(self, work: DecodeWork, *, kill: bool = True) -> list[Task]:
        """End a process in the middle of its files, which are returned."""
        self._let_go(work)
        if kill:
            work.process.kill()
        work.process.close()
        return work.tasks

    def _try_alone(self, tasks: list[Task]) -> None:
        with self._lock:
            self._queue.put_back(tasks)

    def _let_go(self, work: DecodeWork) -> None:
        work.steps.close()
        self._wait_for(work, NO_EVENTS)
        with self._lock:
            del self._busy[work.process]

    def _fork(self) -> DecodeChannel:
        return DecodeChannel(process_server.fork(self._program), self._program)

"""Preparation of images elsewhere than in the caller's thread: in threads, or in processes that decode."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from nopad.pipeline.decode_queue import MAX_BATCH, Done
from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryReservation, Remote, Unread

Item = TypeVar("Item")
_Input = TypeVar("_Input", contravariant=True)

MAX_BYTES_AHEAD = 1 << 26
"""No more items are read while so many bytes of them wait for a process or are with one."""

MAX_FETCHERS = 64
"""Threads that fetch over a network."""

DISK_PER_MEMORY = 64
"""Maximum bytes of files on disk that wait for a process or are with one, for each such byte in memory."""


class Preparer(Protocol[_Input]):
    """Prepares images elsewhere than in the caller's thread; used as a context manager, which ends its threads."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *_: object) -> None: ...
    def submit(self, item: _Input, reservation: MemoryReservation, done: Done) -> None:
        """Prepare an item and call `done`, from any thread."""
        ...


class InThreads(Generic[Item]):
    """Prepares images in threads of this process.

    Args:
        prepare: reserves memory once the size is known, and decodes.
        threads: number of threads.
    """

    def __init__(self, prepare: Callable[[Item, MemoryReservation], PreparedImage], threads: int) -> None:
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nopad-decode")

    def __enter__(self) -> InThreads[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, item: Item, reservation: MemoryReservation, done: Done) -> None:
        """See `Preparer`."""
        self._pool.submit(self._run, item, reservation, done)

    def _run(self, item: Item, reservation: MemoryReservation, done: Done) -> None:
        start = time.perf_counter()
        try:
            outcome = self._prepare(item, reservation)
        except Exception as error:
            outcome = error
        done(outcome, time.perf_counter() - start)


class InProcesses(Generic[Item]):
    """Reads items in one thread, a few ahead of the processes that decode them.

    The thread waits until half of these are used up, and then reads as many at once: threads that wake up for every
    image take turns at the interpreter's lock with the one that feeds the encoder.

    What is fetched over a network is fetched by many threads at once, but goes to the processes in the order of the
    items: memory is granted in that.

    Args:
        read: from an item to what the decoder takes, or to that as `Unread` or `Remote`.
    """

    def __init__(self, read: Callable[[Item], Any], processes: DecodeProcesses) -> None:
        self._read = read
        self._processes = processes
        self._queue: deque[tuple[Item, MemoryReservation, Done]] = deque()
        self._fetching: deque[tuple[Future[Any], MemoryReservation, _Leave]] = deque()
        self._fetchers: ThreadPoolExecutor | None = None
        self._changed = threading.Condition()
        self._started = self._bytes = 0  # of items that were read and are not done
        one_batch = MAX_BATCH * processes.max_processes
        self._max_started, self._refill_below = 2 * one_batch, one_batch + one_batch // 2
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="nopad-read", daemon=True)

    def __enter__(self) -> InProcesses[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._processes.interrupt()  # of what was read ahead nothing is needed any more
        self._thread.join()
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=False, cancel_futures=True)

    def submit(self, item: Item, reservation: MemoryReservation, done: Done) -> None:
        """See `Preparer`."""
        with self._changed:
            self._queue.append((item, reservation, done))
            if len(self._queue) == 1:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        self._is_closed or self._is_fetched() or (self._queue and self._has_room(self._refill_below))
                    )
                )
                if self._is_closed:
                    return
            while self._is_fetched() and not self._is_closed:
                self._submit(*self._fetching.popleft())
            while self._queue and self._has_room(self._max_started) and not self._is_closed:
                self._begin(*self._queue.popleft())

    def _is_fetched(self) -> bool:
        return bool(self._fetching) and self._fetching[0][0].done()

    def _has_room(self, items: int) -> bool:
        return self._started < items and self._bytes < MAX_BYTES_AHEAD

    def _begin(self, item: Item, reservation: MemoryReservation, done: Done) -> None:
        leave = _Leave(self, done)
        with self._changed:
            self._started += 1
        try:
            data = self._read(item)
        except Exception as error:
            leave(error, 0.0)
            return
        if isinstance(data, Remote):
            self._fetchers = self._fetchers or ThreadPoolExecutor(MAX_FETCHERS, thread_name_prefix="nopad-fetch")
            future = self._fetchers.submit(data.fetch)
        elif self._fetching:
            future = Future()
            future.set_result(data)
        else:
            self._submit(data, reservation, leave)
            return
        self._fetching.append((future, reservation, leave))
        future.add_done_callback(lambda future: self._count(future, leave))

    def _count(self, fetched: Future[Any], leave: _Leave) -> None:
        """Count the bytes of what was fetched, in whichever order."""
        with self._changed:
            if not fetched.cancelled() and fetched.exception() is None and isinstance(data := fetched.result(), bytes):
                leave.size = len(data)
                self._bytes += leave.size
            self._changed.notify()

    def _submit(self, data: Any, reservation: MemoryReservation, leave: _Leave) -> None:
        try:
            if isinstance(data, Future):
                data = data.result()
            if isinstance(data, Unread):
                reservation.hold(data.size)
                data = data.read()
        except Exception as error:
            leave(error, 0.0)
            return
        size = len(data) if isinstance(data, bytes) else getattr(data, "disk_bytes", 0) // DISK_PER_MEMORY
        with self._changed:
            self._bytes += size - leave.size
            leave.size = size
        self._processes.submit(data, reservation, leave)

    def leave(self, size: int) -> None:
        """Count an item of so many bytes as done."""
        with self._changed:
            had_room = self._has_room(self._refill_below)
            self._started -= 1
            self._bytes -= size
            if not had_room and self._has_room(self._refill_below):
                self._changed.notify()


@dataclass(eq=False)
class _Leave:
    """Counts an item as done, and then calls its `done`."""

    preparer: InProcesses[Any]
    done: Done
    size: int = 0

    def __call__(self, outcome: PreparedImage | Exception, seconds: float) -> None:
        self.preparer.leave(self.size)
        self.done(outcome, seconds)

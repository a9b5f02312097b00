"""What takes long to list, begun ahead of its turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Full, Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Entry = TypeVar("Entry")

_BATCH, _MAX_BATCHES = 256, 16
_MAX_WAITING = 4096
_POLL_SECONDS = 0.5


class Ahead(Generic[Item]):
    """Items that a thread computes ahead of the one that takes them, by default a few thousand at most.

    The thread does not keep the process from ending.

    Args:
        items: iterated in the thread.
        batch: items that are handed over together.
        max_batches: how many of these may wait.
    """

    def __init__(self, items: Iterable[Item], batch: int = _BATCH, max_batches: int = _MAX_BATCHES) -> None:
        self._batch = batch
        self._batches: Queue[tuple[list[Item], bool]] = Queue(max_batches)
        self._error: BaseException | None = None
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, args=(items,), name="nopad-list", daemon=True).start()

    def __iter__(self) -> Iterator[Item]:
        """The items; then raises what computing them raised."""
        is_last = False
        while not is_last:
            batch, is_last = self._batches.get()
            yield from batch
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Compute no more."""
        self._is_closed.set()

    def _run(self, items: Iterable[Item]) -> None:
        batch: list[Item] = []
        try:
            for item in items:
                batch.append(item)
                if len(batch) >= self._batch:
                    if not self._put(batch, is_last=False):
                        return
                    batch = []
        except BaseException as error:
            self._error = error
        self._put(batch, is_last=True)

    def _put(self, batch: list[Item], *, is_last: bool) -> bool:
        while not self._is_closed.is_set():
            with suppress(Full):
                self._batches.put((batch, is_last), timeout=_POLL_SECONDS)
                return True
        return False


def begun_ahead(entries: Iterator[Entry], begin: Callable[[Entry], bool], number: int) -> Iterator[Entry]:
    """Entries in their order, each begun before it comes.

    Args:
        begin: begins an entry, or returns False where there is nothing to begin.
        number: how many that were begun may be there, with the one that came last.

    Raises:
        Exception: that of `entries`, after all entries before it.
    """
    waiting: deque[tuple[Entry, bool]] = deque()
    num_begun = 0
    error: Exception | None = None
    is_over = False
    while True:
        while not is_over and num_begun < number and len(waiting) < _MAX_WAITING:
            try:
                entry = next(entries)
            except StopIteration:
                is_over = True
            except Exception as raised:
                error, is_over = raised, True
            else:
                is_begun = begin(entry)
                num_begun += is_begun
                waiting.append((entry, is_begun))
        if not waiting:
            break
        entry, is_begun = waiting.popleft()
        yield entry
        num_begun -= is_begun
    if error is not None:
        raise error

"""Images prepared ahead of the encoder, in order, within a bound of memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

from nopad.pipeline.decode_queue import Done
from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.memory import MemoryBudget, MemoryReservation
from nopad.pipeline.preparers import Preparer
from nopad.pipeline.process_server import ProcessServerError
from nopad.pipeline.stats import Stats
from nopad.preprocessing.decode import ImageError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = PreparedImage | ImageError


class ReadAhead(Generic[Item]):
    """Prepares the images of groups, a bounded number and a bounded size ahead of the consumer.

    Args:
        groups: taken one after another, as they are needed. An iterator that has ended may go on: its next item is
            tried again whenever there is room, and for the last time when all images were taken.
        preparer: prepares the images.
        ahead: maximum number of images.
        budget: bounds the memory; closed at the end.
        stats: `decode_seconds` and `wait_seconds` are added up here.
        is_far: whether no more images are taken now, unless there is none.
    """

    def __init__(
        self,
        groups: Iterable[Iterable[Item]],
        preparer: Preparer[Item],
        ahead: int,
        budget: MemoryBudget,
        stats: Stats,
        is_far: Callable[[], bool] = lambda: False,
    ) -> None:
        self._groups = iter(groups)
        self._items: Iterator[Item] | None = None
        self._preparer = preparer
        self._max_waiting = ahead
        self._waiting: deque[tuple[Future[Outcome], MemoryReservation] | None] = deque()
        self._budget = budget
        self._stats = stats
        self._is_far = is_far
        self._lock = threading.Lock()

    def __enter__(self) -> ReadAhead[Item]:
        self._preparer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.close()
        self._preparer.__exit__()

    @property
    def is_ready(self) -> bool:
        """Whether the next image is prepared, or the next group has none."""
        return bool(self._waiting) and (self._waiting[0] is None or self._waiting[0][0].done())

    def groups(self) -> Iterator[Iterator[Outcome]]:
        """Group after group; each must be exhausted before the next.

        Raises:
            ProcessServerError: no process can be started.
        """
        self._submit()
        while self._waiting:
            yield self._group()
            self._submit()

    def _group(self) -> Iterator[Outcome]:
        while (entry := self._waiting.popleft()) is not None:
            self._submit()
            future, reservation = entry
            if future.done():
                outcome = future.result()
            else:
                start = time.perf_counter()
                outcome = future.result()
                self._stats.wait_seconds += time.perf_counter() - start
            reservation.release()
            yield outcome
        self._submit()

    def _submit(self) -> None:
        while len(self._waiting) <= self._max_waiting and not (self._waiting and self._is_far()):
            if self._items is None:
                if (group := next(self._groups, None)) is None:
                    return
                self._items = iter(group)
            for item in self._items:
                reservation, future = self._budget.reservation(), Future[Outcome]()
                self._waiting.append((future, reservation))
                self._preparer.submit(item, reservation, self._done(item, reservation, future))
                break
            else:
                self._items = None
                self._waiting.append(None)  # ends the group

    def _done(self, item: Item, reservation: MemoryReservation, future: Future[Outcome]) -> Done:
        def done(outcome: PreparedImage | Exception, seconds: float) -> None:
            reservation.finish_decoding(outcome.data.nbytes if isinstance(outcome, PreparedImage) else 0)
            with self._lock:
                self._stats.decode_seconds += seconds
            if isinstance(outcome, PreparedImage | ImageError):
                future.set_result(outcome)
            elif isinstance(outcome, ProcessServerError):
                future.set_exception(outcome)
            else:  # one image must not end a job of a million; its row has the error
                logger.error("unexpected error with %r", item, exc_info=outcome)
                error = ImageError(repr(item), f"unexpected {type(outcome).__name__}: {outcome}")
                future.set_result(error)

        return done

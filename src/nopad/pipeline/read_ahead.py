"""Images prepared in threads ahead of the encoder, in order, within a bound of memory."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Generic, TypeVar

from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.memory import MemoryBudget, Reservation
from nopad.pipeline.process_server import ProcessServerError
from nopad.pipeline.stats import Stats
from nopad.preprocessing.decode import ImageError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = PreparedImage | ImageError


class ReadAhead(Generic[Item]):
    """Prepares the images of groups in threads, a bounded number and a bounded size ahead of the consumer.

    Args:
        groups: taken one after another, as they are needed.
        prepare: runs in the threads; reserves memory once it knows how much.
        threads: number of threads.
        budget: of the memory.
        stats: `decode_seconds` and `wait_seconds` are added up here.
    """

    def __init__(
        self,
        groups: Iterable[Iterable[Item]],
        prepare: Callable[[Item, Reservation], PreparedImage],
        threads: int,
        budget: MemoryBudget,
        stats: Stats,
    ) -> None:
        self._items: Iterator[tuple[Item] | None] = chain.from_iterable(  # `None` ends a group
            chain(((item,) for item in group), (None,)) for group in groups
        )
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nopad-decode")
        self._max_waiting = max(16, 2 * threads)
        self._waiting: deque[tuple[Future[Outcome], Reservation] | None] = deque()
        self._budget = budget
        self._stats = stats
        self._lock = threading.Lock()

    def __enter__(self) -> ReadAhead[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def groups(self) -> Iterator[Iterator[Outcome]]:
        """Group after group; each must be exhausted before the next.

        Raises:
            ProcessServerError: no process can be started.
        """
        self._submit()
        while self._waiting:
            yield self._group()

    def _group(self) -> Iterator[Outcome]:
        while (entry := self._waiting.popleft()) is not None:
            self._submit()
            future, reservation = entry
            start = time.perf_counter()
            outcome = future.result()
            self._stats.wait_seconds += time.perf_counter() - start
            reservation.release()
            yield outcome
        self._submit()

    def _submit(self) -> None:
        while len(self._waiting) <= self._max_waiting:
            try:
                entry = next(self._items)
            except StopIteration:
                return
            if entry is None:
                self._waiting.append(None)
                continue
            reservation = self._budget.reservation()
            self._waiting.append((self._pool.submit(self._run, entry[0], reservation), reservation))

    def _run(self, item: Item, reservation: Reservation) -> Outcome:
        start = time.perf_counter()
        size = 0
        try:
            image = self._prepare(item, reservation)
            size = image.patches.nbytes
            return image
        except ImageError as error:
            return error
        except ProcessServerError:
            raise
        except Exception as error:  # one image must not end a job of a million; its row has the error
            logger.exception("unexpected error with %r", item)
            return ImageError(repr(item), f"unexpected {type(error).__name__}: {error}")
        finally:
            reservation.finish_decoding(size)
            with self._lock:
                self._stats.decode_seconds += time.perf_counter() - start

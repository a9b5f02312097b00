"""Embeds the inputs of shards and puts these into the job's folder, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.near_reads import NearReads
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.inputs.whole_tars import Found
from nopad.embedding.job import FeatureSizes, Job, make_reader
from nopad.embedding.shard_in_hand import ShardInHand
from nopad.embedding.table.reader import names
from nopad.environment import cpu_threads
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import Part, Worker
from nopad.preprocessing.decode import UnreachableError
from nopad.storage.errors import UnusableStoreError
from nopad.terminal import printable

logger = logging.getLogger(__name__)

_MAX_WAITING = 16
"""Parts of shards that wait to be written; the encoder waits for a disk that is slower."""


@dataclass
class RunCounts:
    """What a run has done so far.

    Attributes:
        write_seconds: spent writing shards, beside the encoder.
        done: rows that were written.
        found: images in whole tars.
        retried: failed rows that were tried again.
        unmade: shards of which an attempt failed and why; the next run makes them.
    """

    stats: Stats = field(default_factory=Stats)
    write_seconds: float = 0.0
    done: int = 0
    found: Found = field(default_factory=Found)
    retried: int = 0
    unmade: dict[int, str] = field(default_factory=dict)


class Maker:
    """Makes the shards of a job by a worker.

    Args:
        worker: made by the job's settings.
        counts: what the run has done so far.
        stop: once set, the shard in hand is finished and no other.
        report: called with a shard that is written, or is not made now, its inputs and how many of them failed.
    """

    def __init__(
        self,
        job: Job,
        worker: Worker,
        counts: RunCounts,
        stop: threading.Event | None = None,
        report: Callable[[int, int, int], None] = lambda shard, number, num_failed: None,
    ) -> None:
        self.job = job
        self.worker = worker
        self.counts = counts
        self.stop = stop or threading.Event()
        self.report = report
        self.sizes = FeatureSizes.of(worker.encoder, job.settings.selection)
        self._unfinished: set[ShardInHand] = set()

    def make(self, shards: Iterable[int], skipped: Mapping[int, str] | None = None) -> None:
        """Make shards, whether they are there or not.

        Args:
            shards: see `ReadAhead` for an iterator that goes on later.
            skipped: rows of a shard that become failed rows without being read, and their reasons.
        """

        self._work(shards, lambda begun: None, skipped or {})

    def retry(self, shards: Iterable[int], skipped: Mapping[int, str] | None = None) -> None:
        """Try the failed rows of finished shards again, each shard replaced as a whole."""
        self._work(shards, self._rows_to_retry, skipped or {})

    def probe(self, shard: int, rows: Sequence[int]) -> None:
        """Embed some rows of a shard and keep nothing."""
        with self._embedded([self._inputs(self._begin(shard, rows), {})]) as parts:
            for _ in parts:
                pass

    def _begin(self, shard: int, rows: Sequence[int] | None = None) -> ShardInHand:
        return ShardInHand(self.job, self.sizes, shard, rows)

    def _inputs(self, begun: ShardInHand, skipped: Mapping[int, str]) -> Iterator[Input]:
        """The inputs of the rows of a shard that are embedded, and take note of them."""
        left = None if begun.rows is None else {*begun.rows}
        found = self.counts.found if left is None else None
        try:
            for row, item in enumerate(() if left == set() else self.job.of(begun.shard, found)):
                if left is not None:
                    if row not in left:
                        continue
                    left.remove(row)
                begun.items.append(item)
                yield _skip(item, skipped.get(row))
                if left == set():
                    break
        except (UnreachableError, UnreachableSourceError, UnusableStoreError) as error:
            begun.error = error

    def _rows_to_retry(self, begun: ShardInHand) -> Sequence[int] | None:
        """The failed rows of a shard, `None` for all rows of one whose whole tars have others now."""
        path = self.job.path(begun.shard)
        rows = self.job.failed(begun.shard)
        begun.num_failed = len(rows)
        if not rows or not self.job.tars(begun.shard):
            return rows
        before = names(path)
        try:
            now = [(item.source, item.id) for item in self.job.of(begun.shard)]
        except (UnreachableError, UnreachableSourceError, UnusableStoreError) as error:
            begun.error = error
            return []
        if now == [(source, id) for source, id, _ in before]:
            return rows
        lost = Counter((source, id) for source, id, status in before if status != "failed") - Counter(now)
        if not lost:  # what could not be read as a whole can be now
            return None
        source, id = next(iter(lost))
        reason = f"{id} is not there any more; --update takes it as it is now"
        begun.error = UnreachableError(source, reason)
        return []

    @contextmanager
    def _embedded(self, groups: Iterable[Iterable[Input]]) -> Iterator[Iterator[Part]]:
        with ExitStack() as ends:
            reader = ends.enter_context(make_reader(self.job.settings))
            ends.enter_context(cpu_threads(self.job.threads))
            near = NearReads(reader.media)
            options = {"decoder": reader.decoder, "stop": self.stop, "is_far": near.is_far}
            parts = self.worker.run_in_parts(map(near.listed, groups), near.read, **options)
            ends.enter_context(closing(parts))
            ends.callback(reader.interrupt)  # the thread that reads ahead need not finish
            yield parts

    def _work(
        self,
        shards: Iterable[int],
        rows_of: Callable[[ShardInHand], Sequence[int] | None],
        skipped: Mapping[int, str],
    ) -> None:
        """Embed rows of shards, and write them beside the encoder, in a thread."""
        if self.stop.is_set():
            return
        begun: deque[ShardInHand] = deque()

        def read(shard: int) -> Iterator[Input]:
            each = self._begin(shard)
            each.rows = rows_of(each)
            self._unfinished.add(each)
            begun.append(each)
            return self._inputs(each, skipped)

        with ExitStack() as ends:
            tables = ends.enter_context(closing(TableProcess(self.job.settings.input_timeout)))
            ends.callback(self._close)
            writing = ends.enter_context(_Writing())
            parts = ends.enter_context(self._embedded(map(read, shards)))
            ends.callback(tables.interrupt)
            for part in parts:
                writing.submit(self._put, begun[0], part, tables)
                if part.is_last:
                    begun.popleft()
            writing.finish()

    def _put(self, shard: ShardInHand, part: Part, tables: TableProcess) -> None:
        """Write results of a shard."""
        start = time.perf_counter()
        shard.add(part.results, tables)
        if part.is_last:
            self._finish(shard, tables)
        self.counts.write_seconds += time.perf_counter() - start
        if part.is_last:
            self.report(shard.shard, shard.reached.number, shard.reached.num_failed)

    def _finish(self, shard: ShardInHand, tables: TableProcess) -> None:
        """Put a shard in its place, or note why it cannot be made now."""
        try:
            shard.finish(tables)
        except UnreachableError as error:
            self.counts.unmade[shard.shard] = printable(str(error))
            logger.warning("%s is not made: %s", self.job.path(shard.shard).name, self.counts.unmade[shard.shard])
        else:
            self.counts.done += shard.reached.number
            self.counts.retried += shard.num_failed
        finally:
            shard.close()
            self._unfinished.discard(shard)

    def _close(self) -> None:
        while self._unfinished:
            self._unfinished.pop().close()


class _Writing:
    """A thread that writes, beside the encoder, in order; nothing behind an error."""

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nopad-write")
        self._waiting: deque[Future[None]] = deque()
        self._is_broken = False

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(cancel_futures=True)

    def submit(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write something later; raises what was raised before."""
        self._waiting.append(self._writer.submit(self._write, write, *arguments))
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft().result()

    def finish(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def _write(self, write: Callable[..., None], *arguments: Any) -> None:
        if self._is_broken:
            return
        try:
            write(*arguments)
        except BaseException:
            self._is_broken = True
            raise


def _skip(item: Input, reason: str | None) -> Input:
    return item if reason is None else replace(item, kind="broken", note=reason)

"""Embeds the inputs of shards and puts these into the job's folder, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.near_reads import NearReads
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.inputs.whole_tars import Found
from nopad.embedding.job import FeatureSizes, Job, make_reader
from nopad.embedding.rows import check_listed, check_reached, table_rows
from nopad.embedding.table.format import Row
from nopad.embedding.table.reader import iterate_rows, names
from nopad.environment import cpu_threads
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError, UnreachableError
from nopad.storage.errors import UnusableStoreError
from nopad.terminal import printable

logger = logging.getLogger(__name__)


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

    def make(self, shards: Iterable[int], skipped: Mapping[int, str] | None = None) -> None:
        """Make shards, whether they are there or not.

        Args:
            shards: see `ReadAhead` for an iterator that goes on later.
            skipped: rows of a shard that become failed rows without being read, and their reasons.
        """

        self._work(shards, lambda begun: None, skipped or {}, self._keep)

    def retry(self, shards: Iterable[int], skipped: Mapping[int, str] | None = None) -> None:
        """Try the failed rows of finished shards again, each shard replaced as a whole."""
        self._work(shards, self._rows_to_retry, skipped or {}, self._replace)

    def probe(self, shard: int, rows: Sequence[int]) -> None:
        """Embed some rows of a shard and keep nothing."""
        with self._embedded([self._inputs(_Begun(shard, rows), {})]) as results:
            for _ in results:
                pass

    def _inputs(self, begun: _Begun, skipped: Mapping[int, str]) -> Iterator[Input]:
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

    def _rows_to_retry(self, begun: _Begun) -> Sequence[int] | None:
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
    def _embedded(self, groups: Iterable[Iterable[Input]]) -> Iterator[Iterator[list[EmbeddingResult]]]:
        with ExitStack() as ends:
            reader = ends.enter_context(make_reader(self.job.settings))
            ends.enter_context(cpu_threads(self.job.threads))
            near = NearReads(reader.media)
            options = {"decoder": reader.decoder, "stop": self.stop, "is_far": near.is_far}
            results = ends.enter_context(closing(self.worker.run(map(near.listed, groups), near.read, **options)))
            ends.callback(reader.interrupt)  # the thread that reads ahead need not finish
            yield results

    def _work(
        self,
        shards: Iterable[int],
        rows_of: Callable[[_Begun], Sequence[int] | None],
        skipped: Mapping[int, str],
        keep: Callable[[_Begun, list[Row]], None],
    ) -> None:
        """Embed rows of shards and keep them."""
        if self.stop.is_set():
            return
        begun: deque[_Begun] = deque()

        def read(shard: int) -> Iterator[Input]:
            each = _Begun(shard)
            each.rows = rows_of(each)
            begun.append(each)
            return self._inputs(each, skipped)

        with (
            closing(TableProcess(self.job.settings.input_timeout)) as tables,
            ThreadPoolExecutor(1, thread_name_prefix="nopad-write") as writer,
            self._embedded(map(read, shards)) as results,
            ExitStack() as ends,
        ):
            ends.callback(tables.interrupt)
            writing = None
            for embedded in results:
                each = begun.popleft()
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._try_to_put, each, embedded, keep, tables)
            if writing is not None:
                writing.result()

    def _try_to_put(self, begun: _Begun, results: list[EmbeddingResult], *how: Any) -> None:
        """Write a shard, or note why it cannot be made now, and report it; in a thread, beside the encoder."""
        shard = begun.shard
        try:
            check_listed(begun.error, results)
            if not self.job.settings.unreachable_rows:
                is_whole = begun.rows is None or (not self.job.tars(shard) and len(begun.items) == self.job.size(shard))
                check_reached(begun.items, results, is_whole=is_whole)
            self._put(begun, results, *how)
        except UnreachableError as error:
            self.counts.unmade[shard] = printable(str(error))
            logger.warning("%s is not made: %s", self.job.path(shard).name, self.counts.unmade[shard])
        self.report(shard, len(results), sum(result.error is not None for result in results))

    def _put(
        self,
        begun: _Begun,
        results: list[EmbeddingResult],
        keep: Callable[[_Begun, list[Row]], None],
        tables: TableProcess,
    ) -> None:
        start = time.perf_counter()
        kept = self._kept(begun.items, results, tables)
        keep(begun, table_rows(begun.items, results, self.job.settings.embedding_dtype, kept))
        self.counts.write_seconds += time.perf_counter() - start
        self.counts.done += len(results)

    def _kept(
        self, items: Sequence[Input], results: Sequence[EmbeddingResult], tables: TableProcess
    ) -> list[tuple[Any, ...]]:
        if self.job.kept is None:
            return [()] * len(items)
        return self.job.kept.values(items, [result.extras for result in results], tables)

    def _keep(self, begun: _Begun, rows: list[Row]) -> None:
        if self.job.tars(begun.shard):
            name = self.job.path(begun.shard).name
            self.job.folder.keep_members(name, begun.items, self.job.check_lock)
        self.job.write(begun.shard, rows, self.sizes)

    def _replace(self, begun: _Begun, rows: list[Row]) -> None:
        if begun.rows is None:
            self._keep(begun, rows)
        else:
            retried = iter(rows)
            table = iterate_rows(self.job.path(begun.shard))
            whole = [next(retried) if row.status == "failed" else row for row in table]
            self.job.write(begun.shard, whole, self.sizes)
        self.counts.retried += begun.num_failed


@dataclass(eq=False)
class _Begun:
    """A shard whose inputs are read.

    Attributes:
        rows: those that are embedded, `None` for all.
        items: their inputs, as far as they are read: as they are listed, for their names and columns.
        num_failed: failed rows that are tried again.
        error: why not all inputs are known.
    """

    shard: int
    rows: Sequence[int] | None = None
    items: list[Input] = field(default_factory=list)
    num_failed: int = 0
    error: OSError | ImageError | None = None


def _skip(item: Input, reason: str | None) -> Input:
    return item if reason is None else replace(item, kind="broken", note=reason)

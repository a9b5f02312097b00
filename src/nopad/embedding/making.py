"""Embeds the inputs of shards and puts these into the job's folder, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.job import FeatureSizes, Job, make_reader
from nopad.embedding.rows import check_reached, table_rows
from nopad.embedding.table.format import Row
from nopad.embedding.table.reader import iterate_rows
from nopad.environment import cpu_threads
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import UnreachableError
from nopad.terminal import printable

logger = logging.getLogger(__name__)


@dataclass
class RunCounts:
    """What a run has done so far.

    Attributes:
        write_seconds: spent writing shards, beside the encoder.
        done: rows that were written.
        retried: failed rows that were tried again.
        unmade: shards of which an attempt failed and why; the next run makes them.
    """

    stats: Stats = field(default_factory=Stats)
    write_seconds: float = 0.0
    done: int = 0
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

        self._work(shards, lambda shard: range(self.job.size(shard)), skipped or {}, self._keep)

    def retry(self, shards: Iterable[int], skipped: Mapping[int, str] | None = None) -> None:
        """Try the failed rows of finished shards again, each shard replaced as a whole."""
        self._work(shards, self.job.failed, skipped or {}, self._replace)

    def probe(self, shard: int, rows: Sequence[int]) -> None:
        """Embed some rows of a shard and keep nothing."""
        inputs = self.job.of(shard)
        with self._embedded([[inputs[row] for row in rows]]) as results:
            for _ in results:
                pass

    @contextmanager
    def _embedded(self, groups: Iterable[list[Input]]) -> Iterator[Iterator[list[EmbeddingResult]]]:
        with (
            make_reader(self.job.settings) as reader,
            cpu_threads(self.job.threads),
            closing(self.worker.run(groups, reader.media, decoder=reader.decoder, stop=self.stop)) as results,
            ExitStack() as ends,
        ):
            ends.callback(reader.interrupt)  # the thread that reads ahead need not finish
            yield results

    def _work(
        self,
        shards: Iterable[int],
        rows_of: Callable[[int], Sequence[int]],
        skipped: Mapping[int, str],
        keep: Callable[[int, list[Row]], None],
    ) -> None:
        """Embed rows of shards and keep them."""
        if self.stop.is_set():
            return
        begun: deque[tuple[int, list[Input]]] = deque()  # as they are listed, for their names and columns

        def read(shard: int) -> list[Input]:
            inputs, rows = self.job.of(shard), rows_of(shard)
            begun.append((shard, [inputs[row] for row in rows]))
            return [_skip(inputs[row], skipped.get(row)) for row in rows]

        with (
            closing(TableProcess(self.job.settings.input_timeout)) as tables,
            ThreadPoolExecutor(1, thread_name_prefix="nopad-write") as writer,
            self._embedded(map(read, shards)) as results,
            ExitStack() as ends,
        ):
            ends.callback(tables.interrupt)
            writing = None
            for embedded in results:
                shard, items = begun.popleft()
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._try_to_put, shard, items, embedded, keep, tables)
            if writing is not None:
                writing.result()

    def _try_to_put(self, shard: int, items: list[Input], results: list[EmbeddingResult], *how: Any) -> None:
        """Write a shard, or note why it cannot be made now, and report it; in a thread, beside the encoder."""
        try:
            if not self.job.settings.unreachable_rows:
                check_reached(items, results, is_whole=len(items) == self.job.size(shard))
            self._put(shard, items, results, *how)
        except UnreachableError as error:
            self.counts.unmade[shard] = printable(str(error))
            logger.warning("%s is not made: %s", self.job.path(shard).name, self.counts.unmade[shard])
        self.report(shard, len(results), sum(result.error is not None for result in results))

    def _put(
        self,
        shard: int,
        items: list[Input],
        results: list[EmbeddingResult],
        keep: Callable[[int, list[Row]], None],
        tables: TableProcess,
    ) -> None:
        start = time.perf_counter()
        kept = self._kept(items, results, tables)
        keep(shard, table_rows(items, results, self.job.settings.embedding_dtype, kept))
        self.counts.write_seconds += time.perf_counter() - start
        self.counts.done += len(results)

    def _kept(
        self, items: Sequence[Input], results: Sequence[EmbeddingResult], tables: TableProcess
    ) -> list[tuple[Any, ...]]:
        if self.job.kept is None:
            return [()] * len(items)
        return self.job.kept.values(items, [result.extras for result in results], tables)

    def _keep(self, shard: int, rows: list[Row]) -> None:
        self.job.write(shard, rows, self.sizes)

    def _replace(self, shard: int, rows: list[Row]) -> None:
        retried = iter(rows)
        whole = [next(retried) if row.status == "failed" else row for row in iterate_rows(self.job.path(shard))]
        self.job.write(shard, whole, self.sizes)
        self.counts.retried += len(rows)


def _skip(item: Input, reason: str | None) -> Input:
    return item if reason is None else replace(item, kind="broken", note=reason)

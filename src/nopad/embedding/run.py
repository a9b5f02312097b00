"""A run of a job: makes the shards that are missing, in this process."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

from nopad.embedding.estimate import mean_patches
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.job import Job, make_reader
from nopad.embedding.progress import Progress, Ticker
from nopad.embedding.rows import check_reached, table_rows
from nopad.embedding.summary import Summary
from nopad.embedding.table.format import Row
from nopad.embedding.table.reader import count, failed_rows, iterate_rows
from nopad.environment import cpu_threads
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import UnreachableError
from nopad.terminal import printable

logger = logging.getLogger(__name__)


class Run:
    """Makes the shards of a job that are missing and, on request, tries failed rows again.

    Args:
        worker: made by the job's settings.
        stop: once set, the shard in hand is finished and no other.
        progress: called with how far the run is, a few times a second.

    Attributes:
        unmade: shards of which an attempt failed and why, since an input could not be reached; the next run makes them.
    """

    def __init__(
        self,
        job: Job,
        worker: Worker,
        *,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.job = job
        self.worker = worker
        self.stop = stop or threading.Event()
        self.progress = progress or (lambda _: None)
        self.stats = worker.stats
        self.write_seconds = 0.0
        self.unmade: dict[int, str] = {}
        self.encoders, self.decode_processes = 1, worker.threads  # actors have others
        self.done = 0
        finished = job.finished()
        self.missing = sorted(set(range(len(job))) - set(finished))
        failed = {shard: count(job.path(shard))[1] for shard in finished} if job.settings.retry_failed else {}
        self.again = {shard: num_failed for shard, num_failed in failed.items() if num_failed}
        self.to_retry = sum(self.again.values())
        self.to_do = self.to_retry + sum(job.size(shard) for shard in self.missing)
        self.kept = len(job.inputs) - self.to_do
        self.start = time.perf_counter()
        self.seconds = 0.0
        self.mean_patches: float | None = None

    def estimate(self) -> None:
        """Read some headers, so that progress has the number of patches to expect."""
        if self.to_do and not self.stop.is_set():
            with make_reader(self.job.settings) as reader:
                self.mean_patches = mean_patches(self.job.inputs, reader, self.worker.image_processor)
            self.start = time.perf_counter()

    def make(self, shards: Sequence[int]) -> None:
        """Make shards that are missing."""
        self._work(shards, self.job.of, self._keep)

    def retry(self) -> None:
        """Try the failed rows of finished shards again, each shard replaced as a whole."""
        self._work(list(self.again), self._failed, self._replace)

    def _failed(self, shard: int) -> list[Input]:
        inputs = self.job.of(shard)
        return [inputs[row] for row, *_ in failed_rows(self.job.path(shard))]

    def _work(
        self, shards: Sequence[int], inputs_of: Callable[[int], list[Input]], keep: Callable[[int, list[Row]], None]
    ) -> None:
        if not shards or self.stop.is_set():
            return
        settings = self.job.settings
        groups = (inputs_of(shard) for shard in shards)
        with (
            make_reader(settings) as reader,
            closing(TableProcess(settings.input_timeout)) as tables,
            cpu_threads(self.job.threads),
            Ticker(self.report),
            ThreadPoolExecutor(1, thread_name_prefix="nopad-write") as writer,
            closing(self.worker.run(groups, reader.media, decoder=reader.decoder, stop=self.stop)) as results,
            ExitStack() as ends,
        ):
            ends.callback(tables.interrupt)
            ends.callback(reader.interrupt)  # the thread that reads ahead need not finish
            writing = None
            for shard, embedded in zip(shards, results, strict=False):
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._try_to_put, shard, inputs_of(shard), embedded, keep, tables)
            if writing is not None:
                writing.result()
        self.seconds = time.perf_counter() - self.start

    def _try_to_put(self, shard: int, items: list[Input], results: list[EmbeddingResult], *how: Any) -> None:
        """Write a shard, or note why it cannot be made now; in a thread, beside the encoder."""
        try:
            if not self.job.settings.unreachable_rows:
                check_reached(items, results)
            self._put(shard, items, results, *how)
        except UnreachableError as error:
            self.unmade[shard] = printable(str(error))
            logger.warning("%s is not made: %s", self.job.path(shard).name, self.unmade[shard])

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
        self.write_seconds += time.perf_counter() - start
        self.done += len(results)

    def _kept(
        self, items: Sequence[Input], results: Sequence[EmbeddingResult], tables: TableProcess
    ) -> list[tuple[Any, ...]]:
        if self.job.kept is None:
            return [()] * len(items)
        return self.job.kept.values(items, [result.extras for result in results], tables)

    def _keep(self, shard: int, rows: list[Row]) -> None:
        self.job.write(shard, rows, self.worker.encoder)

    def _replace(self, shard: int, rows: list[Row]) -> None:
        retried = iter(rows)
        whole = [next(retried) if row.status == "failed" else row for row in iterate_rows(self.job.path(shard))]
        self.job.write(shard, whole, self.worker.encoder)
        self.to_retry -= len(rows)

    def report(self) -> None:
        """Report how far the run is."""
        self.progress(Progress(self.to_do, self.kept, self.stats, time.perf_counter() - self.start, self.mean_patches))

    def summary(self, left_out: Mapping[str, int], changes: Sequence[str]) -> Summary:
        """Counts of the table as it is now, and of this run."""
        finished = self.job.finished()
        counts = {self.job.path(shard).name: count(self.job.path(shard)) for shard in finished}
        rows = sum(ok + failed for ok, failed in counts.values())
        missing = len(self.job.inputs) - sum(map(self.job.size, finished))
        return Summary(
            folder=str(self.job.folder.path),
            rows=rows,
            failed=sum(failed for _, failed in counts.values()),
            missing=missing,
            to_go=missing + self.to_retry,
            done=self.done,
            seconds=self.seconds,
            stats=self.stats,
            write_seconds=self.write_seconds,
            device="GPU" if self.worker.encoder.device.type == "cuda" else self.worker.encoder.device.type.upper(),
            encoders=self.encoders,
            decode_processes=self.decode_processes,
            left_out=dict(left_out),
            changes=list(changes),
            shards_with_failures=[name for name, (_, failed) in counts.items() if failed],
            unmade={self.job.path(shard).name: reason for shard, reason in sorted(self.unmade.items())},
        )

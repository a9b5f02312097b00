"""A run of a job: which shards it is to make, how far it is, and its summary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from nopad.embedding.inputs.whole_tars import tars_in_words
from nopad.embedding.job import Job
from nopad.embedding.making import RunCounts
from nopad.embedding.progress import Progress
from nopad.embedding.summary import Summary
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.paths import TablePath


class Run:
    """The shards of a job that are missing and, on request, those with failed rows to try again.

    Args:
        counts: what the run has done so far.
        manifest: of the table.
        stop: once set, shards in hand are finished and no others.
        progress: called with how far the run is, a few times a second.

    Attributes:
        missing: shards to make.
        failed_shards: shards with failed rows to try again, and how many.
        device: what encoders run on, `"cpu"` or `"cuda"`.
        encoders, decode_processes: how many work at the same time.
    """

    def __init__(
        self,
        job: Job,
        counts: RunCounts,
        manifest: Manifest,
        *,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.job = job
        self.counts = counts
        self.manifest = manifest
        self.stop = stop or threading.Event()
        self.progress = progress or (lambda _: None)
        self.device, self.encoders, self.decode_processes = "cpu", 1, 1
        finished = {shard: path for shard, path in job.finished().items() if shard in job.part}
        self.missing = sorted({*job.part} - {*finished})
        failed = (
            {shard: manifest.count(path).failed for shard, path in finished.items()}
            if job.settings.retry_failed
            else {}
        )
        self.failed_shards = {shard: num_failed for shard, num_failed in failed.items() if num_failed}
        self.to_retry = sum(self.failed_shards.values())
        self.to_do = self.to_retry + sum(job.size(shard) for shard in self.missing)
        self.rows_before = sum(self._rows(shard, path) for shard, path in finished.items()) - self.to_retry
        tars = [job.tars(shard) for shard in self.missing] if job.whole_tars else []
        self._num_tars, self._tar_bytes = sum(map(len, tars)), sum(each.num_bytes for each in tars)
        self.begin()
        self.mean_patches: float | None = None

    def begin(self) -> None:
        """Its seconds begin here."""
        self.start, self.seconds = time.perf_counter(), 0.0

    def end(self) -> None:
        """Its seconds end here."""
        self.seconds = time.perf_counter() - self.start

    def _rows(self, shard: int, path: TablePath) -> int:
        return self.manifest.count(path).rows if self.job.tars(shard) else self.job.size(shard)

    def report(self) -> None:
        """Report how far the run is."""
        seconds, found = time.perf_counter() - self.start, self.counts.found
        tars, rows = "", self.to_do
        if self._num_tars:
            rows += round(found.images * self._tar_bytes / found.bytes) - self._num_tars if found.bytes else 0
        if found.bytes < self._tar_bytes:
            tars = tars_in_words(self._num_tars, self._tar_bytes)
        rows = 0 if tars and not found.bytes else rows
        self.progress(Progress(rows, self.rows_before, self.counts.stats, seconds, self.mean_patches, tars))

    def summary(self, left_out: Mapping[str, int], changes: Sequence[str]) -> Summary:
        """Counts of the table as it is now, and of this run."""
        job = self.job
        finished = job.finished()
        missing = len(job.inputs) - sum(map(job.size, finished))
        missing_in_part = sum(job.size(shard) for shard in job.part if shard not in finished)
        # A part counts its own rows, and those of the whole table once all are there.
        counted = [path for shard, path in finished.items() if not missing or shard in job.part]
        shards = {path.name: self.manifest.count(path) for path in counted}
        rows = sum(shard.ok + shard.failed for shard in shards.values())
        return Summary(
            folder=str(self.job.folder.path),
            rows=rows,
            failed=sum(shard.failed for shard in shards.values()),
            missing=missing,
            to_go=missing_in_part + self.to_retry - self.counts.retried,
            done=self.counts.done,
            seconds=self.seconds,
            stats=self.counts.stats,
            write_seconds=self.counts.write_seconds,
            device="GPU" if self.device == "cuda" else self.device.upper(),
            encoders=self.encoders,
            decode_processes=self.decode_processes,
            left_out=dict(left_out),
            changes=list(changes),
            shards_with_failures=[name for name, shard in shards.items() if shard.failed],
            part=job.settings.part and "/".join(map(str, job.settings.part)),
            unmade={self.job.path(shard).name: reason for shard, reason in sorted(self.counts.unmade.items())},
        )

"""A job's shards made in the command's own process."""

from __future__ import annotations

from collections.abc import Mapping

from nopad.embedding.actors.actor import LoadedEncoder
from nopad.embedding.estimate import mean_patches
from nopad.embedding.job import Job, make_reader
from nopad.embedding.making import Maker, RunCounts
from nopad.embedding.manifest import begin_weights_digest
from nopad.embedding.progress import Ticker
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.workers import load_encoder, make_worker
from nopad.encoder import PackedEncoder


class InProcess:
    """Makes shards in this process.

    Args:
        model: an encoder, or `None` to load that of the settings.
        num_inputs: of the job.
        begun: the record of the job that was begun in the folder.
        estimates: whether headers are read for an estimate.

    Attributes:
        encoder: what was loaded.
    """

    def __init__(
        self,
        settings: Settings,
        model: PackedEncoder | None,
        num_inputs: int,
        begun: Mapping[str, str],
        *,
        estimates: bool,
    ) -> None:
        encoder = load_encoder(settings) if model is None else model
        weights = begin_weights_digest(encoder)
        self._worker = make_worker(settings, encoder, num_inputs, begun, is_loaded=model is None)
        self._estimates = estimates
        self.encoder = LoadedEncoder.of(settings, self._worker, weights.result())

    def new_counts(self) -> RunCounts:
        """Of a run; the jobs of a table have their counts and seconds in common."""
        return RunCounts(self._worker.stats)

    def work(self, run: Run) -> None:
        """Make the shards of a run, after failed rows that are tried again."""
        run.device, run.decode_processes = self.encoder.device, self.encoder.decode_processes
        if not run.to_do or run.stop.is_set():
            return
        if self._estimates:
            run.mean_patches = self._mean_patches(run.job)
        run.begin()
        with Ticker(run.report):
            maker = Maker(run.job, self._worker, run.counts, run.stop)
            if run.failed_shards:
                maker.retry(run.failed_shards)
            if run.missing:
                maker.make(run.missing)
        run.end()

    def close(self) -> None:
        """Nothing is left to end."""

    def _mean_patches(self, job: Job) -> float | None:
        with make_reader(job.settings) as reader:
            return mean_patches(job.inputs, reader, self._worker.image_processor)

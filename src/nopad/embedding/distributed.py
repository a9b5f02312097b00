"""A job's shards made by actors: processes of this machine, or those of a Ray cluster."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any

from nopad.counts import counted
from nopad.embedding.actors.actor import ActorConfig, LoadedEncoder, ShardMaker
from nopad.embedding.actors.actor_pool import ActorPool
from nopad.embedding.actors.engine import Task
from nopad.embedding.actors.scheduler import Scheduler
from nopad.embedding.actors.starting import StartingActors
from nopad.embedding.actors.work import Work
from nopad.embedding.folder import JobFolder
from nopad.embedding.job import Job
from nopad.embedding.making import RunCounts
from nopad.embedding.manifest import check_same
from nopad.embedding.progress import Ticker
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import absolute
from nopad.pipeline.stats import Stats
from nopad.preprocessing.decode import UnreachableError

logger = logging.getLogger(__name__)


class ByActors:
    """Makes shards by actors, one GPU each where the job's device is a GPU; as many start as there are shards to make.

    This process loads no encoder: the first actor's is the job's, and others must be alike.

    Args:
        starting: the engine, which this ends.
        folder: of the table.
        num_inputs: of the job.
        num_shards: that are to be made, as far as is known before they are looked at.
        begun: the record of the job that was begun in the folder.
        token: of the lock that this process holds.
        stop: once set, shards in hand are finished and no others.

    Attributes:
        encoder: what the first actor has loaded; `None` where `stop` was set before.

    Raises:
        ValueError: a cluster without room for one actor, or a node whose checkpoint or installation is another.
        ChildProcessError: actors die whatever they do.
        ConnectionError: the cluster cannot be reached.
        LostEngineError: its head is lost, or Ray itself failed.
    """

    def __init__(
        self,
        starting: StartingActors,
        settings: Settings,
        folder: JobFolder,
        num_inputs: int,
        num_shards: int,
        begun: Mapping[str, str],
        token: str,
        stop: threading.Event,
    ) -> None:
        _, self._max = settings.num_actors
        self._folder = folder
        self._is_alone = settings.part is None  # else other parts may be writing there
        self._stats = Stats()
        self._starting = starting
        self.encoder: LoadedEncoder | None = None
        if (actors := starting.wait()) is None:
            return
        model = os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model
        workers = settings.workers or actors.cores
        local = replace(settings, model=model, device=actors.device, workers=workers)
        config = ActorConfig(absolute(folder.path), settings, local, num_inputs, token)
        pool = ActorPool(
            actors.engine,
            partial(ShardMaker, config),
            started=[actors.first],
            begun=begun,
            record=_record,
            check=partial(_check, folder),
        )
        self._scheduler = Scheduler(pool, self._max, stall=settings.stall, stop=stop)
        self.encoder = self._scheduler.load(num_shards)

    def new_counts(self) -> RunCounts:
        """Of a run; the jobs of a table have their counts and seconds in common."""
        return RunCounts(self._stats)

    def work(self, run: Run) -> None:
        """Make the shards of a run, and try failed rows again.

        Raises:
            Errors of making shards in one process, and those of actors; finished shards are kept in any case.
        """
        assert self.encoder is not None
        job_threads, actor_threads = run.job.threads or 0, int(self.encoder.record["threads"] or 0)
        if job_threads > actor_threads and run.missing:
            what = "actors: this job computes with %s, an actor has %s; set OMP_NUM_THREADS=%d when a job begins"
            logger.warning(what, counted(job_threads, "thread"), counted(actor_threads, "core"), actor_threads)
        works, number = _works(run), len(run.failed_shards) + len(run.missing)
        run.device = self.encoder.device
        run.encoders = max(1, min(self._max, number))
        run.decode_processes = run.encoders * self.encoder.decode_processes
        if not number or run.stop.is_set():
            return
        run.begin()
        with Ticker(run.report):
            for work, result in self._scheduler.make(works, number):
                _add(run, work, result)
        run.end()

    def close(self) -> None:
        """End the actors, and what they have left half-written."""
        self._starting.close()
        if self._is_alone:
            with suppress(OSError):
                self._folder.clean()


def _works(run: Run) -> Iterator[Work]:
    job = run.job
    for shard in run.failed_shards:
        yield Work(Task(job.folder.update, shard, retry=True), job.path(shard).name, partial(job.failed, shard))
    for shard in run.missing:
        yield Work(Task(job.folder.update, shard), job.path(shard).name, partial(_rows, job, shard))


def _rows(job: Job, shard: int) -> Sequence[int]:
    """The rows of a shard; none where a whole tar cannot be reached."""
    if not job.tars(shard):
        return range(job.size(shard))
    try:
        return range(sum(1 for _ in job.of(shard)))
    except (UnreachableError, OSError) as error:
        logger.warning("%s: %s", job.path(shard).name, error)
        return ()


def _add(run: Run, work: Work, result: Mapping[str, Any] | None) -> None:
    counts = run.counts
    if result is None:
        counts.unmade[work.task.shard] = work.not_made
        return
    for field in fields(Stats):
        setattr(counts.stats, field.name, getattr(counts.stats, field.name) + result["stats"][field.name])
    counts.write_seconds += result["write_seconds"]
    counts.done += result["rows"]
    counts.retried += 0 if work.task.replace else result["retried"]
    if not work.task.retry and not work.task.replace:
        tars = run.job.tars(work.task.shard)
        counts.found.images += result["rows"] if tars else 0
        counts.found.bytes += tars.num_bytes


def _record(encoder: LoadedEncoder) -> Mapping[str, str]:
    return encoder.record


def _check(folder: JobFolder, first: Mapping[str, str], other: Mapping[str, str]) -> None:
    check_same(first, other, folder.path)

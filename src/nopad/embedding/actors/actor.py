"""An actor: loads the encoder, reads the job from its folder and makes shards, one task after another."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from nopad.embedding.actors.engine import NodeError, Task
from nopad.embedding.folder import JobFolder
from nopad.embedding.job import FeatureSizes, Job
from nopad.embedding.lock import check_owner, check_record
from nopad.embedding.making import Maker, RunCounts
from nopad.embedding.manifest import record_of
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import TablePath
from nopad.embedding.table.reader import count
from nopad.embedding.workers import describe_execution, load_encoder, make_worker
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import Worker


@dataclass(frozen=True)
class ActorConfig:
    """Arguments of an actor. The list of inputs, which may have millions, is read from the folder.

    Attributes:
        folder: of the table.
        settings: of the command.
        local_settings: the same on the actor: the model's path made absolute, its device and number of decode threads.
        num_inputs: of the job.
        token: see `check_owner`; empty for a part of a job, which has no lock.
    """

    folder: str
    settings: Settings
    local_settings: Settings
    num_inputs: int
    token: str


@dataclass(frozen=True)
class LoadedEncoder:
    """The encoder of an actor.

    Attributes:
        record: see `record_of`.
        description: how it runs, in words.
        device: its type.
        decode_processes: those of one actor.
    """

    record: Mapping[str, str]
    description: str
    sizes: FeatureSizes
    hidden_size: int
    device: str
    decode_processes: int

    @classmethod
    def of(cls, settings: Settings, worker: Worker) -> LoadedEncoder:
        """That of a worker."""
        sizes = FeatureSizes.of(worker.encoder, settings.selection)
        device = worker.encoder.device.type
        hidden_size = worker.encoder.hidden_size
        record = record_of(settings, worker)
        return cls(record, describe_execution(worker), sizes, hidden_size, device, worker.threads)


class ShardMaker:
    """An actor: makes one shard after another with an encoder that it loads once."""

    def __init__(self, config: ActorConfig) -> None:
        self.config = config
        self._worker: Worker | None = None
        self._counts = RunCounts()
        self._job = cache(self._read_job)

    def place(self) -> tuple[str, int]:
        """The machine and the process."""
        return socket.gethostname(), os.getpid()

    def load(self, begun: Mapping[str, str]) -> LoadedEncoder:
        """Load the encoder, by the choices of a job that was begun."""
        settings = self.config.local_settings
        self._worker = make_worker(settings, load_encoder(settings), self.config.num_inputs, begun)
        self._counts = RunCounts(self._worker.stats)
        return LoadedEncoder.of(self.config.settings, self._worker)

    def progress(self) -> tuple[Any, ...]:
        """Differs after anything was done; may be called from another thread."""
        counts = self._counts
        return *asdict(counts.stats).values(), counts.done, counts.write_seconds

    def do(self, task: Task) -> dict[str, Any]:
        """Do a task: counts and seconds by the names of `Stats`, `write_seconds`, and the shard's `rows`.

        One that cannot be made now has the reason as `unmade`, and no rows.
        """
        job = self._job(task.update)
        is_new = not (task.retry or task.replace or task.probe)
        if is_new and job.path(task.shard).exists():
            return _existing(job.path(task.shard))
        assert self._worker is not None
        before = replace(self._counts, stats=replace(self._counts.stats))
        maker = Maker(job, self._worker, self._counts)
        if task.probe is not None:
            maker.probe(task.shard, task.probe)
        elif task.retry:
            maker.retry([task.shard], task.skipped)
        else:
            try:
                maker.make([task.shard], task.skipped)
            except OSError:
                if not job.path(task.shard).exists():
                    raise
                return _existing(job.path(task.shard))  # another part was faster, and has tidied up behind it
        stats, seconds = self._counts.stats.since(before.stats), self._counts.write_seconds - before.write_seconds
        if (unmade := self._counts.unmade.pop(task.shard, None)) is not None:
            return {**_result(0, 0, seconds, stats), "unmade": unmade}
        return _result(self._counts.done - before.done, stats.failed, seconds, stats)

    def _read_job(self, update: int) -> Job:
        folder = JobFolder(self.config.folder, update)
        if not folder.has_job:
            raise NodeError(
                f"{socket.gethostname()}: {self.config.folder} has no job in its .nopad; the table's folder must lie "
                f"on a file system that all machines see under the same path"
            )
        settings = replace(self.config.settings, retry_failed=False)
        record, inputs = folder.read(is_checked=True)
        if self.config.token:
            check = partial(check_owner, folder.path, self.config.token)
        else:
            check = partial(check_record, folder.metadata / "job.json", record)
        return Job(settings, folder, record, inputs, check)


def _existing(path: TablePath) -> dict[str, Any]:
    """The result of a shard that is there: its actor died after it had put it there, or another part has made it."""
    ok, failed = count(path)
    return _result(ok + failed, failed, 0.0, Stats(images=ok + failed, failed=failed))


def _result(rows: int, failed: int, write_seconds: float, stats: Stats) -> dict[str, Any]:
    return {"rows": rows, "num_failed": failed, "write_seconds": write_seconds, "stats": asdict(stats)}

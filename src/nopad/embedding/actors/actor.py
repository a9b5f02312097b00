"""An actor: loads the encoder, reads the job from its folder and makes shards, one task after another."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

from nopad.embedding.actors.engine import NodeError, Task
from nopad.embedding.folder import JobFolder
from nopad.embedding.job import FeatureSizes, Job
from nopad.embedding.lock import check_owner, check_record
from nopad.embedding.making import Maker, RunCounts
from nopad.embedding.manifest import begin_weights_digest, record_of
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import TablePath
from nopad.embedding.table.reader import count
from nopad.embedding.workers import describe_execution, load_encoder, make_worker
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import Worker


def place() -> tuple[str, int]:
    """The machine and the process."""
    return socket.gethostname(), os.getpid()


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
    def of(cls, settings: Settings, worker: Worker, weights: str) -> LoadedEncoder:
        """That of a worker; `weights` as `record_of` takes them."""
        sizes = FeatureSizes.of(worker.encoder, settings.selection)
        device = worker.encoder.device.type
        hidden_size = worker.encoder.hidden_size
        record = record_of(settings, worker, weights)
        return cls(record, describe_execution(worker), sizes, hidden_size, device, worker.threads)


class ShardMaker:
    """An actor: makes one shard after another with an encoder that it loads once.

    Loading and all tasks run in one thread, in their order. While one shard is encoded, the inputs of the next are read
    and decoded, if there is a task for it by then.

    Attributes:
        on_ready: called, in any thread, when all inputs of the last task are read ahead.
    """

    def __init__(self, config: ActorConfig) -> None:
        self.config = config
        self.on_ready: Callable[[], None] = lambda: None
        self._worker: Worker | None = None
        self._counts = RunCounts()
        self._job = cache(self._read_job)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="nopad-encode")
        self._tasks: deque[_Entry] = deque()
        self._lock = threading.Lock()
        self._reported = RunCounts()  # what earlier results had

    def load(self, begun: Mapping[str, str]) -> LoadedEncoder:
        """Load the encoder, by the choices of a job that was begun."""
        return self._thread.submit(self._load, begun).result()

    def _load(self, begun: Mapping[str, str]) -> LoadedEncoder:
        settings = self.config.local_settings
        encoder = load_encoder(settings)
        weights = begin_weights_digest(encoder)
        self._worker = make_worker(settings, encoder, self.config.num_inputs, begun)
        self._counts, self._reported = RunCounts(self._worker.stats), RunCounts(replace(self._worker.stats))
        return LoadedEncoder.of(self.config.settings, self._worker, weights.result())

    def progress(self) -> tuple[Any, ...]:
        """Differs after anything was done; may be called from another thread."""
        counts = self._counts
        return *asdict(counts.stats).values(), counts.done, counts.write_seconds

    def do(self, task: Task) -> dict[str, Any]:
        """Do a task and return its result, see `submit`."""
        return self.submit(task).result()

    def submit(self, task: Task) -> Future[dict[str, Any]]:
        """Begin a task, or after those before it; they end in their order.

        Returns:
            Counts and seconds by the names of `Stats`, `write_seconds`, the shard's `rows`, and how many failed ones
            were `retried`. Of a task that cannot be done now the reason as `unmade`, and no rows.
        """
        entry = _Entry(task, Future())
        with self._lock:
            self._tasks.append(entry)
        self._thread.submit(self._work)
        return entry.future

    def _work(self) -> None:
        """Do the tasks that are there."""
        while self._tasks:
            for entry in [*self._tasks]:  # begun, perhaps, when another failed
                entry.is_begun = False
            entry = self._tasks[0]
            try:
                if entry.task.is_plain and not self._job(entry.task.update).path(entry.task.shard).exists():
                    self._make(entry.task.update)
                else:
                    self._finish(entry, self._do(entry.task))
            except OSError as error:
                self._failed(error)
            except Exception as error:
                self._fail(error)

    def _make(self, update: int) -> None:
        """Make the shards of the plain tasks that are first, and of those that come before the last is done."""
        assert self._worker is not None
        job = self._job(update)

        def report(shard: int, number: int, num_failed: int) -> None:
            self._finish(self._tasks[0], self._result(shard, number, num_failed))

        Maker(job, self._worker, self._counts, report=report).make(_Shards(self._tasks, update, job, self.on_ready))

    def _do(self, task: Task) -> dict[str, Any]:
        job = self._job(task.update)
        is_new = not (task.retry or task.replace or task.probe)
        if is_new and job.path(task.shard).exists():
            return _existing(job.path(task.shard))
        assert self._worker is not None
        counts = 0, 0

        def report(shard: int, number: int, num_failed: int) -> None:
            nonlocal counts
            counts = number, num_failed

        maker = Maker(job, self._worker, self._counts, report=report)
        if task.probe is not None:
            maker.probe(task.shard, task.probe)
        elif task.retry:
            maker.retry([task.shard], task.skipped)
        else:
            maker.make([task.shard], task.skipped)
        return self._result(task.shard, *counts)

    def _result(self, shard: int, number: int, num_failed: int) -> dict[str, Any]:
        """The result of a shard: its inputs, and all else that was counted since the last one."""
        counts, reported = replace(self._counts, stats=replace(self._counts.stats)), self._reported
        self._reported = counts
        stats = counts.stats.since(reported.stats)
        stats.images, stats.failed = number, num_failed  # others are of the next shard, which may be lost yet
        seconds = counts.write_seconds - reported.write_seconds
        if (unmade := self._counts.unmade.pop(shard, None)) is not None:
            return {**_result(0, 0, seconds, stats), "unmade": unmade}
        return _result(number, num_failed, seconds, stats, counts.retried - reported.retried)

    def _finish(self, entry: _Entry, result: dict[str, Any]) -> None:
        with self._lock:
            assert self._tasks.popleft() is entry
        entry.future.set_result(result)

    def _failed(self, error: OSError) -> None:
        """The first task has failed; unless another part was faster to make its shard, and has tidied up behind it."""
        task = self._tasks[0].task
        path = self._job(task.update).path(task.shard)
        if not (task.retry or task.probe) and path.exists():
            self._finish(self._tasks[0], _existing(path))
        else:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            entry = self._tasks.popleft()
        entry.future.set_exception(error)

    def _read_job(self, update: int) -> Job:
        folder = JobFolder(self.config.folder, update)
        if not folder.has_job:
            raise NodeError(
                f"{socket.gethostname()}: {self.config.folder} has no job in its .nopad; the table's folder must lie "
                f"on a file system that all machines see under the same path"
            )
        settings = replace(self.config.settings, retry_failed=False)
        record, inputs, borders = folder.read(is_checked=True)
        if self.config.token:
            check = partial(check_owner, folder.path, self.config.token)
        else:
            check = partial(check_record, folder.metadata / "job.json", record)
        return Job(settings, folder, record, inputs, borders, check)


@dataclass(eq=False)
class _Entry:
    """A task, and what becomes of it."""

    task: Task
    future: Future[dict[str, Any]]
    is_begun: bool = False


class _Shards:
    """The shards of the plain tasks of a job, in their order; goes on when there are more of them.

    Args:
        tasks: those that are not done.
        on_ready: called when all are begun, once for each.
    """

    def __init__(self, tasks: deque[_Entry], update: int, job: Job, on_ready: Callable[[], None]) -> None:
        self._tasks = tasks
        self._update = update
        self._job = job
        self._on_ready = on_ready
        self._was_ready = False

    def __iter__(self) -> _Shards:
        return self

    def __next__(self) -> int:
        entry = next((entry for entry in [*self._tasks] if not entry.is_begun), None)
        if entry is None:
            if not self._was_ready:
                self._was_ready = True
                self._on_ready()
            raise StopIteration
        task = entry.task
        if not task.is_plain or task.update != self._update or self._job.path(task.shard).exists():
            raise StopIteration  # it is done when those before it are
        entry.is_begun, self._was_ready = True, False
        return task.shard


def _existing(path: TablePath) -> dict[str, Any]:
    """The result of a shard that is there: its actor died after it had put it there, or another part has made it."""
    ok, failed = count(path)
    return _result(ok + failed, failed, 0.0, Stats(images=ok + failed, failed=failed))


def _result(rows: int, failed: int, write_seconds: float, stats: Stats, retried: int = 0) -> dict[str, Any]:
    counts = {"rows": rows, "num_failed": failed, "retried": retried}
    return {**counts, "write_seconds": write_seconds, "stats": asdict(stats)}

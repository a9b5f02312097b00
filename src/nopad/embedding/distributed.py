"""A job's shards made by actors: processes of this machine, or those of a Ray cluster."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch

from nopad.counts import counted
from nopad.embedding.actors.actor import ActorConfig, LoadedEncoder, ShardMaker
from nopad.embedding.actors.actor_pool import ActorPool
from nopad.embedding.actors.engine import Engine, Task
from nopad.embedding.actors.processes import ProcessEngine
from nopad.embedding.actors.scheduler import Scheduler
from nopad.embedding.actors.work import Work
from nopad.embedding.folder import JobFolder
from nopad.embedding.making import RunCounts
from nopad.embedding.manifest import check_same
from nopad.embedding.progress import Ticker
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import absolute
from nopad.environment import check_device
from nopad.extras import install
from nopad.pipeline.stats import Stats
from nopad.pipeline.worker import num_cores

logger = logging.getLogger(__name__)


class ByActors:
    """Makes shards by actors, one GPU each where the job's device is a GPU.

    This process loads no encoder: the first actor's is the job's, and others must be alike.

    Args:
        folder: of the table.
        num_inputs: of the job.
        begun: the record of the job that was begun in the folder.
        token: of the lock that this process holds.
        stop: once set, shards in hand are finished and no others.

    Attributes:
        encoder: what the first actor has loaded; `None` where `stop` was set before.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a cluster without room for one actor, or a node whose checkpoint or installation is another.
        ChildProcessError: actors die whatever they do.
        ConnectionError: the cluster cannot be reached.
        RuntimeError: Ray itself failed.
    """

    def __init__(
        self,
        settings: Settings,
        folder: JobFolder,
        num_inputs: int,
        begun: Mapping[str, str],
        token: str,
        stop: threading.Event,
    ) -> None:
        self._min, self._max = settings.num_actors
        self._folder = folder
        self._is_alone = settings.part is None  # else other parts may be writing there
        self._stats = Stats()
        self._ends = ExitStack()
        self.encoder: LoadedEncoder | None = None
        local = replace(
            settings,
            model=os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model,
        )
        config = ActorConfig(absolute(folder.path), settings, local, num_inputs, token)
        with self._ends:
            engine = self._ends.enter_context(_engine(config, self._min, self._max, stop))
            if engine is not None:
                pool = ActorPool(engine, begun=begun, record=_record, check=partial(_check, folder))
                self._scheduler = Scheduler(pool, self._max, stall=settings.stall, stop=stop)
                self.encoder = self._scheduler.load()
            self._ends = self._ends.pop_all()

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
        self._ends.close()
        if self._is_alone:
            with suppress(OSError):
                self._folder.clean()


def _works(run: Run) -> Iterator[Work]:
    job = run.job
    for shard in run.failed_shards:
        yield Work(Task(job.folder.update, shard, retry=True), job.path(shard).name, job.failed(shard))
    for shard in run.missing:
        yield Work(Task(job.folder.update, shard), job.path(shard).name, range(job.size(shard)))


def _add(run: Run, work: Work, result: Mapping[str, Any] | None) -> None:
    counts = run.counts
    if result is None:
        counts.unmade[work.task.shard] = work.not_made
        return
    for field in fields(Stats):
        setattr(counts.stats, field.name, getattr(counts.stats, field.name) + result["stats"][field.name])
    counts.write_seconds += result["write_seconds"]
    counts.done += result["rows"]
    counts.retried += result["rows"] if work.task.retry and not work.task.replace else 0


def _record(encoder: LoadedEncoder) -> Mapping[str, str]:
    return encoder.record


def _check(folder: JobFolder, first: Mapping[str, str], other: Mapping[str, str]) -> None:
    check_same(first, other, folder.path)


@contextmanager
def _engine(config: ActorConfig, min_: int, max_: int, stop: threading.Event) -> Iterator[Engine | None]:
    """What starts the actors; `None` where `stop` was set while it was looked for."""
    if (address := _ray_address(config.settings)) is None:
        engine = _processes(config, max_)
        try:
            yield engine
        finally:
            engine.close()
        return
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError(f"ray: this needs Ray ({error}): {install('ray')}") from error
    from nopad.embedding.actors.on_ray import RayEngine
    from nopad.embedding.actors.ray_head import connected

    try:
        with ExitStack() as ends:
            try:
                head = ends.enter_context(connected(address, stop))
            except InterruptedError:
                yield None
                return
            nodes = ray.nodes()
            has_gpus = any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in nodes)
            device = check_device("device", config.settings.device or ("cuda" if has_gpus else "cpu")).type
            cores = cores_of_an_actor(nodes, min_, on_gpu=device == "cuda")
            local = replace(config.local_settings, device=device, workers=config.local_settings.workers or cores)
            program = partial(ShardMaker, replace(config, local_settings=local))
            engine = RayEngine(program, {"num_cpus": cores, "num_gpus": int(device == "cuda")}, head)
            ends.callback(engine.close)
            yield engine
    except RayError as error:
        raise RuntimeError(f"Ray failed; run the job again to go on: {error}") from error


def _ray_address(settings: Settings) -> str | None:
    """Of the cluster whose actors are used, `None` for processes of this machine."""
    if settings.actors is None:
        return None
    if (address := settings.ray or os.environ.get("RAY_ADDRESS")) is not None:
        return address
    ray = sys.modules.get("ray")
    return "auto" if ray is not None and ray.is_initialized() else None


def _processes(config: ActorConfig, actors: int) -> ProcessEngine:
    """Processes that share this machine's cores, or have a GPU each.

    Raises:
        ValueError: a GPU that several actors cannot share.
    """
    settings = config.settings
    num_gpus = torch.cuda.device_count()
    device = check_device("device", settings.device or ("cuda" if num_gpus else "cpu"))
    places = num_cores()
    environments: list[dict[str, str]] = [{}]
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
        if device.index is not None and actors > 1:
            raise ValueError(f"device: {device} is one GPU, which {actors} actors cannot share; give cuda alone")
        indices = range(num_gpus) if device.index is None else [device.index]
        environments = [{"CUDA_VISIBLE_DEVICES": visible[index]} for index in indices]
        if not num_gpus or not all(index < num_gpus for index in indices):
            raise ValueError(f"device: got {str(device)!r}, but torch sees {counted(num_gpus, 'CUDA device')}")
        places = len(environments)
    if actors > places:
        what = "a GPU" if device.type == "cuda" else "a core"
        logger.warning("actors: %d requested, there is room for %d with %s each", actors, places, what)
        actors = places
    cores = max(1, num_cores() // actors)
    if device.type == "cpu":
        threads = {} if actors == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(cores)}
        environments = [threads] * actors
    local = replace(config.local_settings, device=device.type, workers=settings.workers or cores)
    return ProcessEngine(partial(ShardMaker, replace(config, local_settings=local)), environments[:actors])


def cores_of_an_actor(nodes: Sequence[Mapping[str, Any]], actors: int, *, on_gpu: bool) -> int:
    """Maximum number of cores that each of `actors` can have on the nodes of the cluster.

    Raises:
        ValueError: there is no room for one actor.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]

    def num_fitting(cores: int) -> int:
        fit = [int(node.get("CPU", 0)) // cores for node in alive]
        return sum(min(n, int(node.get("GPU", 0))) if on_gpu else n for n, node in zip(fit, alive, strict=True))

    what = "a core and a GPU" if on_gpu else "a core"
    if num_fitting(1) == 0:
        raise ValueError(f"actors: got {actors}, but no node of the Ray cluster has {what} for one: {alive}")
    if num_fitting(1) < actors:
        logger.warning("actors: %d requested, there is room for %d with %s each", actors, num_fitting(1), what)
    max_cores = max(int(node.get("CPU", 0)) for node in alive)
    return next((cores for cores in range(max_cores, 1, -1) if num_fitting(cores) >= actors), 1)

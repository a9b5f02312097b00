"""A job's shards made by actors on Ray, on one machine or many that share the folder.

Through Ray go the numbers of shards and what became of them, never pixels or features: an actor reads the job from its
folder and puts each shard there, as a run in one process does. Which actor makes which shard is decided here: Ray's own
queues would begin shards after a Ctrl-C, and its streaming executor outlives the connection.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import Any

import torch

from nopad.counts import counted
from nopad.embedding.actor import ActorConfig, ShardMaker
from nopad.embedding.lock import LostLockError
from nopad.embedding.progress import Ticker
from nopad.embedding.run import Run
from nopad.pipeline.stats import Stats

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""The job fails when this many processes have died over one shard."""

MAX_IDLE_SECONDS = 30.0
"""After this time without any actor at work, a warning is logged."""

# Numbers take little; Ray's own choice, 30 % of the memory, is more shared memory than most containers have.
_OBJECT_STORE_BYTES = 100 << 20
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # deaths of actors are handled and logged here
    "RAY_worker_niceness": "0",  # 15 by default: beside anything else on the machine actors would starve
}


def make_on_ray(run: Run, shards: Sequence[int], actors: int, token: str) -> None:
    """Make shards that are missing by `actors` actors, one GPU each where the job's device is a GPU.

    Connects to the cluster that `RAY_ADDRESS` names (`auto`: the one that was started on this machine), else starts
    Ray for this job alone. An actor that dies is replaced and its shard made anew.

    Args:
        token: of the lock that this process holds.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a cluster without room for one actor, or a node whose checkpoint or installation is another.
        ChildProcessError: a shard that ended its process `MAX_ATTEMPTS` times.
        ConnectionError: the cluster of `RAY_ADDRESS` cannot be reached.
        RuntimeError: Ray itself failed.
        Other errors are those of the run in one process; finished shards are kept in any case.
    """
    if not shards or run.stop.is_set():
        return
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError(f"actors: this needs Ray ({error}): pip install 'nopad[ray]'") from error

    try:
        with _connected(), Ticker(run.report):
            on_gpu = run.worker.encoder.device.type == "cuda"
            cores = _cores_of_an_actor(ray.nodes(), actors, on_gpu=on_gpu)
            if (threads := run.job.threads or 0) > cores:
                what = "actors: this job computes with %s, an actor has %s; set OMP_NUM_THREADS=%d when a job begins"
                logger.warning(what, counted(threads, "thread"), counted(cores, "core"), cores)
            run.worker.encoder.uncompile()  # the actors have their own, one of them maybe on this GPU
            if on_gpu:
                torch.cuda.empty_cache()
            with _Actors(run, cores, token, on_gpu=on_gpu) as pool:
                for shard, result in pool.make(shards, actors):
                    _add(run, shard, result)
    except RayError as error:
        raise RuntimeError(f"Ray failed; run the job again to go on: {error}") from error
    finally:
        with suppress(LostLockError):  # else the files there are another job's
            run.job.check_lock()
            run.job.folder.clean()  # no actor is left that could write there
    run.seconds = time.perf_counter() - run.start


def _add(run: Run, shard: int, result: Mapping[str, Any]) -> None:
    if result.get("unmade"):
        run.unmade[shard] = result["unmade"]
        logger.warning("%s is not made: %s", run.job.path(shard).name, result["unmade"])
    for field in fields(Stats):
        setattr(run.stats, field.name, getattr(run.stats, field.name) + result[field.name])
    run.write_seconds += result["write_seconds"]
    run.done += result["rows"]


class _Actors:
    """The actors of a run and the shards in their hands.

    An actor gets one shard at a time, once it has loaded its encoder: a shard that waits behind another could be made
    by an actor that has nothing to do, and after a stop only shards in hand are waited for.
    """

    def __init__(self, run: Run, cores: int, token: str, *, on_gpu: bool) -> None:
        import ray

        settings = run.job.settings
        self.run = run
        self.needs: dict[str, Any] = {"num_cpus": cores, "num_gpus": int(on_gpu)}
        self.maker: Any = ray.remote(**self.needs)(ShardMaker)
        local_settings = replace(
            settings,
            model=os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model,
            device=run.worker.encoder.device.type,  # Ray shows each actor its own GPU as the only one
            workers=settings.workers or cores,
        )
        folder = os.path.abspath(run.job.folder.path)
        self.config = ActorConfig(folder, settings, local_settings, token, run.job.folder.update)
        self.places: dict[Any, str] = {}  # of each actor that has started: its process and host
        self.loading: dict[Any, Any] = {}  # an actor by the reference to what its call will return
        self.making: dict[Any, tuple[Any, int]] = {}
        self.deaths: Counter[int | None] = Counter()  # of each shard, and of actors without a shard

    def __enter__(self) -> _Actors:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in {*self.loading.values(), *(actor for actor, _ in self.making.values()), *self.places}:
            ray.kill(actor)

    def start(self) -> None:
        """Start an actor; it loads its encoder."""
        actor = self.maker.remote(self.config)
        self.loading[actor.place.remote()] = actor

    def make(self, shards: Sequence[int], actors: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each shard and the result of `ShardMaker.make`, in the order in which they are done.

        Raises:
            ChildProcessError: too many deaths.
            Exception: what an actor raised.
        """
        import ray

        waiting, idle = deque(shards), []
        self.run.encoders = min(actors, len(shards))
        self.run.decode_processes = self.run.encoders * (self.config.local_settings.workers or 1)
        for _ in range(self.run.encoders):
            self.start()
        last, warned = time.monotonic(), False
        while self.making or (waiting and not self.run.stop.is_set()):
            done, _ = ray.wait([*self.loading, *self.making], timeout=0.2)
            for call in done:
                actor, shard = self.making.pop(call) if call in self.making else (self.loading.pop(call), None)
                value = self.value(call, actor, shard)
                if value is None:
                    if shard is not None:
                        waiting.appendleft(shard)
                    self.start()
                    continue
                idle.append(actor)
                if shard is None:
                    self.places[actor] = value
                    self.deaths.pop(None, None)  # actors can start
                else:
                    yield shard, value
            while idle and waiting and not self.run.stop.is_set():
                actor, shard = idle.pop(), waiting.popleft()
                self.making[actor.make.remote(shard)] = (actor, shard)
            if self.making:
                last = time.monotonic()
            elif not warned and time.monotonic() - last > MAX_IDLE_SECONDS:
                warned = True
                free = ray.available_resources()
                logger.warning(
                    "actors: none has started in %.0f s; free now: %s; each: %s", MAX_IDLE_SECONDS, free, self.needs
                )

    def value(self, call: Any, actor: Any, shard: int | None) -> Any:
        """The result of a call, `None` where its actor died."""
        import ray
        from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

        try:
            return ray.get(call)
        except RayTaskError as error:
            raise (error.cause or error) from error
        except RayActorError as error:
            place = self.places.pop(actor, "a process that had not loaded its encoder")
            if isinstance(error, ActorDiedError) and error.preempted:
                logger.warning("actors: %s was preempted", place)
                return None
            self.deaths[shard] += 1
            what = "an actor" if shard is None else self.run.job.path(shard).name
            if self.deaths[shard] >= MAX_ATTEMPTS:
                raise ChildProcessError(
                    f"{what}: {MAX_ATTEMPTS} processes died while they made it, the last was {place}; too little "
                    f"memory, or an input that kills its decoder? finished shards are kept"
                ) from error
            logger.warning("%s: %s died while it made it; it is made again", what, place)
            return None


def _cores_of_an_actor(nodes: Sequence[Mapping[str, Any]], actors: int, *, on_gpu: bool) -> int:
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
        logger.warning("actors: %d wanted, there is room for %d with %s each", actors, num_fitting(1), what)
    max_cores = max(int(node.get("CPU", 0)) for node in alive)
    return next((cores for cores in range(max_cores, 1, -1) if num_fitting(cores) >= actors), 1)


@contextmanager
def _connected() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    if address := os.environ.get("RAY_ADDRESS"):
        ray.init(address, **quiet)
    else:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
        yield
    finally:
        ray.shutdown()

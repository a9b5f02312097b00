"""A job's shards made by actors on Ray, on one machine or many that share the folder.

Through Ray go the numbers of shards and what became of them, never pixels or features: an actor reads the job from its
folder and puts each shard there, as a run in one process does.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nopad.embedding.job import Job
from nopad.embedding.manifest import JobFolder, Settings, check_same, record_of
from nopad.embedding.run import Run, Ticker
from nopad.embedding.table.reader import count
from nopad.pipeline.batches import Tally

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a shard may end the process that makes it before the job fails."""

_STOP = "stop"
# Numbers take little; Ray's own choice, 30 % of the memory, is more shared memory than most containers have.
_OBJECT_STORE = 100 << 20
_PATIENCE = 60.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray warns in every run that its actors' arguments may be lost; they are held here as long as they are needed.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


def make_on_ray(run: Run, shards: Sequence[int], actors: int) -> None:
    """Make shards that are missing by `actors` actors, one GPU each where the job's device is a GPU.

    Connects to the cluster that `RAY_ADDRESS` names or that runs on this machine, and starts Ray here where there is
    none. An actor that dies is started again and its shard made anew.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a cluster without room for one actor, or a node whose checkpoint or installation is another.
        ChildProcessError: a shard that ended its process `ATTEMPTS` times.
        ConnectionError: the cluster of `RAY_ADDRESS` cannot be reached.
        RuntimeError: Ray lost an actor for good.
        Other errors are those of the run in one process; finished shards are kept in any case.
    """
    if not shards or run.stop.is_set():
        return
    try:
        import ray.data
        from ray.exceptions import RayError, RayTaskError
    except ImportError as error:
        raise ImportError(f"actors: this needs Ray ({error}): pip install 'nopad[ray]'") from error

    # The folder is put in order when no actor is left that could write to it.
    with _stop_file(run) as files, _connected(), _quiet_ray_data(), Ticker(run):
        cores = _cores_of_an_actor(ray.nodes(), actors, on_gpu=_on_gpu(run.job.settings))
        try:
            for result in _results(run, shards, actors, cores):
                _add(run, result)
                if (files.own / _STOP).exists() and not any(files.own.glob("*.started")):
                    break  # the others need not all be told
        except RayTaskError as error:
            if isinstance(error.cause, _ShardError):
                raise error.cause.args[0] from None
            raise
        except RayError as error:
            raise RuntimeError(f"Ray lost an actor; run the job again to go on: {error}") from error
    run.seconds = time.perf_counter() - run.start


def _on_gpu(settings: Settings) -> bool:
    return torch.device(settings.device).type == "cuda"


def _results(run: Run, shards: Sequence[int], actors: int, cores: int) -> Iterator[dict[str, Any]]:
    import ray.data

    settings = run.job.settings
    order = _Order(
        folder=os.path.abspath(run.job.files.folder),
        settings=settings,
        model=os.path.abspath(settings.model) if os.path.exists(settings.model) else settings.model,
        threads=run.threads or cores,
        pillow_takes=Image.MAX_IMAGE_PIXELS,
    )
    maker: Any = _ShardMaker  # Ray's annotations know functions only
    made = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards)).map(
        maker,
        fn_constructor_args=[order],
        # One task at a time: a shard that waits behind another could be made by an actor that has nothing to do.
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=cores,
        num_gpus=1 if _on_gpu(settings) else None,
    )
    made.context.raise_original_map_exception = True
    made.context.execution_no_progress_timeout_s = -1  # a shard of videos may take longer than any timeout
    made.context.enable_progress_bars = False
    made.context.print_on_execution_start = False
    batches: Any = made.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
    for batch in batches:
        yield from batch.to_pylist()


def _add(run: Run, result: Mapping[str, Any]) -> None:
    for field in fields(Tally):
        setattr(run.tally, field.name, getattr(run.tally, field.name) + result[field.name])
    run.write += result["write"]
    run.done += result["rows"]


def _cores_of_an_actor(nodes: Sequence[Mapping[str, Any]], actors: int, *, on_gpu: bool) -> int:
    """The most cores that each of `actors` can have on the nodes that are there.

    Raises:
        ValueError: there is no room for one actor.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]

    def room(cores: int) -> int:
        fit = [int(node.get("CPU", 0)) // cores for node in alive]
        return sum(min(n, int(node.get("GPU", 0))) if on_gpu else n for n, node in zip(fit, alive, strict=True))

    what = "a core and a GPU" if on_gpu else "a core"
    if room(1) == 0:
        raise ValueError(f"actors: got {actors}, but no node of the Ray cluster has {what} for one: {alive}")
    if room(1) < actors:
        logger.warning("actors: %d wanted, there is room for %d with %s each", actors, room(1), what)
    most = max(int(node.get("CPU", 0)) for node in alive)
    return next((cores for cores in range(most, 1, -1) if room(cores) >= actors), 1)


@contextmanager
def _connected() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(os.environ.get("RAY_ADDRESS") or "auto", **quiet)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"):
                raise
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE, **quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray has put its own there
        yield
    finally:
        # Ray Data waits two seconds for its own thread; if that speaks to Ray once Ray is gone, the process ends.
        try:
            for thread in threading.enumerate():
                if thread.name.startswith("StreamingExecutor"):
                    thread.join(_PATIENCE)
        finally:
            ray.shutdown()


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Ray Data prints what it does, and errors that are raised here anyway."""
    ray_data = logging.getLogger("ray.data")
    before = ray_data.level
    ray_data.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray_data.setLevel(before)


@contextmanager
def _stop_file(run: Run) -> Iterator[JobFolder]:
    """Put a file into the job's folder when the run is to stop, and take it away in the end.

    Ray Data hands out all shards and has no way to finish those in hand alone: to close its iterator kills the actors.
    A file is seen by all nodes, outlives an actor that dies, and needs no actor of its own. An actor that a node's
    cache keeps from seeing it at once makes another shard, which is no loss.
    """
    files = run.job.files
    path = files.own / _STOP
    path.unlink(missing_ok=True)  # of a run that was killed
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            if run.stop.is_set():
                path.touch()
                return

    thread = threading.Thread(target=watch, name="nopad-stop", daemon=True)
    thread.start()
    try:
        yield files
    finally:
        over.set()
        thread.join()
        path.unlink(missing_ok=True)
        files.clean()


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What an actor is told; the list of inputs, which may have millions, it reads from the folder.

    Attributes:
        model: `settings.model`, its path made absolute.
        threads: that decode.
        pillow_takes: Pillow's limit of pixels, which belongs to a process.
    """

    folder: str
    settings: Settings
    model: str
    threads: int
    pillow_takes: int | None


class _ShardError(Exception):
    """Carries an error to the driver as it was: Ray Data adds its own advice to the arguments of what it gets."""


class _ShardMaker:
    """An actor: makes one shard after another with an encoder that it loads once."""

    def __init__(self, order: _Order) -> None:
        self.order = order
        Image.MAX_IMAGE_PIXELS = order.pillow_takes

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self.make(int(row["shard"]))
        except Exception as error:
            raise _ShardError(error) from error

    def make(self, shard: int) -> dict[str, Any]:
        path = self.job.path(shard)
        started = self.job.files.own / f"{path.name}.started"
        if (self.job.files.own / _STOP).exists():
            started.unlink(missing_ok=True)
            return _result(shard, 0, 0.0, Tally())
        if path.exists():  # the actor died after it had put the shard in its place
            ok, failed = count(path)
            result = _result(shard, ok + failed, 0.0, Tally(images=ok + failed, failed=failed))
        else:
            _begin(started)
            result = self.made(shard)
        started.unlink(missing_ok=True)
        return result

    def made(self, shard: int) -> dict[str, Any]:
        run = self.run
        before, written = replace(run.tally), run.write
        run.make([shard])
        done = {key: value - getattr(before, key) for key, value in asdict(run.tally).items()}
        return _result(shard, self.job.size(shard), run.write - written, Tally(**done))

    @cached_property
    def job(self) -> Job:
        files = JobFolder(self.order.folder)
        return Job(self.order.settings, files, *files.read())

    # Not in the constructor, which Ray would tell apart from a shard's errors, and whose deaths it counts otherwise.
    @cached_property
    def run(self) -> Run:
        settings, job = self.order.settings, self.job
        # Ray shows each actor its own GPU as the only one.
        device = torch.device(settings.device).type
        encoder = replace(settings, model=self.order.model, device=device).load()
        here = record_of(settings, encoder, json.loads(job.record["sources"]), job.inputs)
        try:
            check_same(job.record, here, job.files.folder)
        except ValueError as error:
            raise ValueError(f"{socket.gethostname()} has another checkpoint or installation: {error}") from None
        return Run(job, encoder, threads=self.order.threads)


def _result(shard: int, rows: int, write: float, tally: Tally) -> dict[str, Any]:
    return {"shard": shard, "rows": rows, "write": write, **asdict(tally)}


def _begin(started: Path) -> None:
    """Note that this process begins a shard.

    Raises:
        ChildProcessError: it has ended others too often. Ray would try it for ever.
    """
    with open(started, "a+", encoding="utf-8") as file:
        file.seek(0)
        earlier = file.read().splitlines()
        if len(earlier) >= ATTEMPTS:
            raise ChildProcessError(
                f"{started.name.removesuffix('.started')}: {len(earlier)} processes died while they made it, the last "
                f"was {earlier[-1]}; too little memory, or an input that kills its decoder? finished shards are kept"
            )
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")

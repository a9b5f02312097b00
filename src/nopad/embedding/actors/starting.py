"""Starts the engine of a job and its first actor, while the command imports torch and lists the sources."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from nopad.counts import counted
from nopad.embedding.actors.engine import Engine
from nopad.embedding.actors.processes import ProcessEngine
from nopad.embedding.settings import Settings
from nopad.environment import check_device, num_cores
from nopad.extras import install

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Actors:
    """An engine and what its actors have.

    Attributes:
        first: number of the actor that is started.
        device: type of each actor's device.
        cores: of each actor.
    """

    engine: Engine
    first: int
    device: str
    cores: int


class StartingActors:
    """The engine of a job and its first actor, which starts in the background on a Ray cluster.

    Nothing here imports transformers, and torch only for processes of this machine.

    Args:
        stop: once set, nothing is waited for.

    Raises:
        ImportError: Ray is not installed.
        ValueError: a GPU that several actors cannot share.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self._ends = ExitStack()
        self._actors: Actors | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._connect, args=(settings, stop), daemon=True)
        if (address := _ray_address(settings)) is None:
            self._actors = _processes(settings, self._ends)
            return
        self._address = address
        try:
            import ray  # noqa: F401  # not in the thread, beside the imports of this one
        except ImportError as error:
            raise ImportError(f"ray: this needs Ray ({error}): {install('ray')}") from error
        self._thread.start()

    @property
    def is_on_ray(self) -> bool:
        """Whether actors are those of a Ray cluster."""
        return self._thread.ident is not None

    def wait(self) -> Actors | None:
        """The actors; `None` where `stop` was set before there were any.

        Raises:
            ValueError: a cluster without room for one actor.
            ConnectionError: the cluster cannot be reached.
            LostEngineError: Ray itself failed.
        """
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)  # in steps, between which signals are seen
        if self._error is not None:
            raise self._error
        return self._actors

    def close(self) -> None:
        """End the engine with all actors."""
        if self.is_on_ray:
            self._thread.join()
        self._ends.close()

    def _connect(self, settings: Settings, stop: threading.Event) -> None:
        from nopad.embedding.actors.ray_head import ray_errors

        try:
            with ray_errors():
                self._actors = _on_ray(self._address, settings, stop, self._ends)
        except InterruptedError:  # by `stop`
            pass
        except BaseException as error:
            self._error = error


def _on_ray(address: str, settings: Settings, stop: threading.Event, ends: ExitStack) -> Actors:
    import ray

    from nopad.embedding.actors.on_ray import RayEngine
    from nopad.embedding.actors.ray_head import connected

    head = ends.enter_context(connected(address, stop))
    nodes = ray.nodes()
    has_gpus = any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in nodes)
    device = (settings.device or ("cuda" if has_gpus else "cpu")).partition(":")[0]
    cores = cores_of_an_actor(nodes, settings.num_actors[0], on_gpu=device == "cuda")
    engine = RayEngine({"num_cpus": cores, "num_gpus": int(device == "cuda")}, head)
    ends.callback(engine.close)
    return Actors(engine, engine.start(), device, cores)


def _ray_address(settings: Settings) -> str | None:
    """Of the cluster whose actors are used, `None` for processes of this machine."""
    if settings.actors is None:
        return None
    if (address := settings.ray or os.environ.get("RAY_ADDRESS")) is not None:
        return address
    ray = sys.modules.get("ray")
    return "auto" if ray is not None and ray.is_initialized() else None


def _processes(settings: Settings, ends: ExitStack) -> Actors:
    """Processes that share this machine's cores, or have a GPU each.

    Raises:
        ValueError: a GPU that several actors cannot share.
    """
    import torch

    _, actors = settings.num_actors
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
    engine = ProcessEngine(environments[:actors])
    ends.callback(engine.close)
    return Actors(engine, engine.start(), device.type, cores)


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

"""Actors on a Ray cluster: through Ray go the numbers of shards and what became of them, never pixels or features.

Which actor makes which shard is decided by the scheduler: Ray's own queues would begin shards after a Ctrl-C.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from itertools import islice
from typing import Any

from nopad.embedding.actors.engine import (
    Beat,
    Died,
    Event,
    Finished,
    Loaded,
    Place,
    Placed,
    Program,
    Raised,
    Ready,
    Task,
)
from nopad.embedding.actors.ray_head import RayHead, ray_errors
from nopad.inference_imports import import_for_inference
from nopad.pipeline import process_server

MAX_BEAT_SECONDS = 5.0

_READY_SECONDS = 30.0  # a call of `ready` waits; a task may end without it

MAX_LOST_SECONDS = 60.0
"""An actor to which the connection is lost counts as lost with its machine after this time, unless Ray knows better."""

_LOST_NODE = "because its node has died"


class RayEngine:
    """Starts actors on the cluster that this process is connected to.

    Args:
        needs: resources of an actor, by the names of `ray.remote`'s arguments.
        head: the cluster's, whose end is an error.
    """

    def __init__(self, needs: Mapping[str, Any], head: RayHead) -> None:
        import ray

        self._ray = ray
        self._needs = dict(needs)
        self._head = head
        # Two tasks, and beside them `progress` and `ready`.
        options: dict[str, Any] = {**self._needs, "max_concurrency": 4}
        self._make: Any = ray.remote(**options)(RayActor)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, str]] = {}
        self._tasks: defaultdict[int, deque[Any]] = defaultdict(deque)
        self._next_beat: dict[int, float] = {}
        self._lost_since: dict[int, float] = {}
        self._aside: list[str] = []
        self._number = 0

    @ray_errors()
    def start(self) -> int:
        """See `Engine`."""
        self._head.wait()  # its actor may have died with it
        self._number += 1
        options: dict[str, Any] = {}
        if self._aside:
            options = {"label_selector": {"ray.io/node-id": f"!in({','.join(self._aside)})"}}
        actor = self._make.options(**options).remote() if options else self._make.remote()
        self._actors[self._number] = actor
        self._calls[actor.place.remote()] = self._number, "placed"
        return self._number

    @ray_errors()
    def load(self, actor: int, program: Program, begun: Mapping[str, str]) -> None:
        """See `Engine`."""
        self._calls[self._actors[actor].load.remote(program, begun)] = actor, "loaded"
        self._next_beat[actor] = time.monotonic() + MAX_BEAT_SECONDS

    @ray_errors()
    def send(self, actor: int, task: Task) -> None:
        """See `Engine`."""
        call = self._actors[actor].do.remote(task)
        self._calls[call] = actor, "finished"
        self._tasks[actor].append(call)
        self._ask_ready(actor)

    def _ask_ready(self, actor: int) -> None:
        if (actor, "ready") not in self._calls.values():
            self._calls[self._actors[actor].ready.remote()] = actor, "ready"

    def kill(self, actor: int) -> None:
        """See `Engine`."""
        handle = self._forget(actor)
        self._ray.kill(handle)

    @ray_errors()
    def wait(self, seconds: float) -> list[Event]:
        """See `Engine`."""
        self._head.check()
        self._beat()
        if not self._calls:
            time.sleep(seconds)
            return []
        later = {call for calls in self._tasks.values() for call in islice(calls, 1, None)}
        done, _ = self._ray.wait([call for call in self._calls if call not in later], timeout=seconds)
        return [event for call in done if call in self._calls and (event := self._event(call)) is not None]

    def exclude_node(self, node: str) -> None:
        """See `Engine`."""
        self._aside.append(node)

    def waiting_for(self) -> str:
        """See `Engine`."""
        return f"free now: {self._ray.available_resources()}; each needs {self._needs}"

    def close(self) -> None:
        """See `Engine`."""
        if not self._head.answers():  # Ray would wait for it; actors end with their command
            self._actors.clear()
        for actor in [*self._actors]:
            self.kill(actor)

    def _beat(self) -> None:
        beating = {actor for actor, kind in self._calls.values() if kind == "beat"}
        now = time.monotonic()
        for actor, when in self._next_beat.items():
            if when <= now and actor not in beating:
                self._calls[self._actors[actor].progress.remote()] = actor, "beat"
                self._next_beat[actor] = now + MAX_BEAT_SECONDS

    def _event(self, call: Any) -> Event | None:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

        actor, kind = self._calls.pop(call)
        if kind == "finished":
            self._tasks[actor].popleft()
        try:
            value = self._ray.get(call)
        except RayTaskError as error:
            cause = error.cause or error
            return Raised(actor, cause if isinstance(cause, Exception) else RuntimeError(str(error)))
        except ActorUnavailableError as error:
            return self._lost(actor, _reason(error))
        except RayActorError as error:
            self._forget(actor)
            is_preempted = isinstance(error, ActorDiedError) and error.preempted
            return Died(actor, _reason(error), is_preempted, with_node=_LOST_NODE in str(error))
        if kind == "placed":
            host, pid, node = value
            return Placed(actor, Place(node, host, pid))
        if kind == "found":
            return self._given_up(actor, "the connection to it was lost, and its task with it")
        if kind == "ready":
            if not value and self._tasks[actor]:
                self._ask_ready(actor)
            return Ready(actor) if value else None
        return {"loaded": Loaded, "finished": Finished, "beat": Beat}[kind](actor, value)

    def _lost(self, actor: int, reason: str) -> Event | None:
        """What became of an actor to which the connection is lost; `None` where Ray does not know yet.

        Its process or its machine has ended, and Ray's head finds out which of them after this process. Each call
        returns what is known then.
        """
        since = self._lost_since.setdefault(actor, time.monotonic())
        if time.monotonic() - since >= MAX_LOST_SECONDS:
            return self._given_up(actor, reason)
        handle = self._forget(actor)
        self._actors[actor], self._lost_since[actor] = handle, since
        self._calls[handle.progress.remote()] = actor, "found"
        return None

    def _given_up(self, actor: int, reason: str) -> Event:
        self.kill(actor)
        return Died(actor, reason, with_node=True)

    def _forget(self, actor: int) -> Any:
        self._calls = {call: of for call, of in self._calls.items() if of[0] != actor}
        self._next_beat.pop(actor, None)
        self._tasks.pop(actor, None)
        self._lost_since.pop(actor, None)
        return self._actors.pop(actor)


class RayActor:
    """Ray's actor: what a program makes, with its node."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._is_ready = threading.Event()

    def place(self) -> tuple[str, int, str]:
        import ray

        process_server.start()  # it imports torch while this process does
        import_for_inference()
        from nopad.embedding.actors.actor import place  # imports all else that an actor needs

        return *place(), ray.get_runtime_context().get_node_id()

    def load(self, program: Program, begun: Mapping[str, str]) -> Any:
        self._actor = program()
        self._actor.on_ready = self._is_ready.set
        return self._actor.load(begun)

    def progress(self) -> Any:
        return None if self._actor is None else self._actor.progress()

    def ready(self) -> bool:
        """Wait until all inputs of the task are read ahead; false where that takes long."""
        is_ready = self._is_ready.wait(_READY_SECONDS)
        self._is_ready.clear()
        return is_ready

    def do(self, task: Task) -> dict[str, Any]:
        return self._actor.do(task)


def _reason(error: Exception) -> str:
    """The part of Ray's message that says why an actor has died."""
    text = " ".join(str(error).split())
    detail = text.partition("Worker exit detail: ")[2] or text.partition("The actor is dead because ")[2] or text
    return detail.partition(" Some common causes")[0][:400]

"""What the engine on Ray makes of the answers of Ray, which a stand-in gives here."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from nopad.embedding.actors import on_ray
from nopad.embedding.actors.engine import Died, Finished, Task
from nopad.embedding.actors.on_ray import RayEngine

pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")


class Handle:
    """An actor whose calls are their own references, by method."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self._numbers = itertools.count()

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> tuple[str, int]:
            self.calls.append((method, next(self._numbers)))
            return self.calls[-1]

        return SimpleNamespace(remote=remote)


class Ray:
    """Returns or raises for each method what `answers` has for it; without one a call stays open."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.killed: list[Handle] = []

    def wait(self, calls: list[tuple[str, int]], timeout: float) -> tuple[list[tuple[str, int]], None]:
        return [call for call in calls if call[0] in self.answers], None

    def get(self, call: tuple[str, int]) -> Any:
        answer = self.answers[call[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self, handle: Handle) -> None:
        self.killed.append(handle)


@pytest.fixture
def ray() -> Ray:
    return Ray()


@pytest.fixture
def engine(ray) -> RayEngine:
    head: Any = SimpleNamespace(wait=lambda: None, check=lambda: None, answers=lambda: True)
    engine = RayEngine({}, head)
    engine._ray, engine._make = ray, SimpleNamespace(remote=Handle)
    return engine


@pytest.fixture
def actor(engine) -> int:
    """One that makes a shard, and has another one before it."""
    number = engine.start()
    for shard in range(2):
        engine.send(number, Task(0, shard))
    return number


def unavailable() -> Exception:
    from ray.exceptions import ActorUnavailableError

    return ActorUnavailableError("RpcError: RPC error: recvmsg:Connection reset by peer rpc_code: 14", None)


def dead(message: str) -> Exception:
    from ray.exceptions import ActorDiedError

    error = ActorDiedError()
    error.error_msg = message
    return error


@pytest.mark.parametrize(
    ("message", "with_node"),
    [
        ("The actor is dead because its node has died. Node Id: abc", True),
        ("The actor is dead because its worker process has died. Worker exit detail: it was killed", False),
    ],
)
def test_a_lost_connection_is_not_yet_a_death(engine, ray, actor, message, with_node):
    """Ray's head finds out later than the connection ends whether the process has died, or its machine."""
    ray.answers = {"do": unavailable()}
    assert engine.wait(0.0) == []
    ray.answers = {"progress": unavailable()}
    assert engine.wait(0.0) == engine.wait(0.0) == []
    ray.answers = {"progress": dead(message)}
    (event,) = engine.wait(0.0)
    assert isinstance(event, Died)
    assert (event.actor, event.with_node) == (actor, with_node)
    assert engine.wait(0.0) == []
    assert ray.killed == []  # Ray has no such actor any more


def test_an_actor_that_is_found_again_is_ended_with_its_tasks(engine, ray, actor):
    """They may or may not have reached it."""
    ray.answers = {"ready": unavailable()}
    assert engine.wait(0.0) == []
    ray.answers = {"progress": (1, 2), "do": {"rows": 1}}
    assert engine.wait(0.0) == [Died(actor, "the connection to it was lost, and its task with it", with_node=True)]
    assert len(ray.killed) == 1
    assert engine.wait(0.0) == []


def test_an_actor_of_which_nothing_is_known_is_lost_after_a_while(engine, ray, actor, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(on_ray, "time", clock)
    ray.answers = {"do": unavailable(), "progress": unavailable()}
    assert engine.wait(0.0) == []
    clock.monotonic = lambda: on_ray.MAX_LOST_SECONDS - 1
    assert engine.wait(0.0) == []
    clock.monotonic = lambda: on_ray.MAX_LOST_SECONDS
    (event,) = engine.wait(0.0)
    assert isinstance(event, Died)
    assert event.with_node
    assert "Connection reset by peer" in event.reason
    assert len(ray.killed) == 1


def test_a_task_that_is_done(engine, ray, actor):
    ray.answers = {"do": {"rows": 1}}
    assert engine.wait(0.0) == [Finished(actor, {"rows": 1})]
    assert engine.wait(0.0) == [Finished(actor, {"rows": 1})]

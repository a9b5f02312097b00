"""What starts actors and carries tasks to them: the interface that the scheduler drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Program = Callable[[], Any]


class NodeError(ValueError):
    """Something is wrong with the node of an actor: its files, its installation."""


class LostEngineError(ConnectionError):
    """The engine itself has failed: shards that are finished are kept, and the same call goes on later."""


@dataclass(frozen=True)
class Place:
    """Where an actor runs.

    Attributes:
        node: of the engine's own naming, another one for each machine.
        host: the machine's name.
        pid: the process.
    """

    node: str
    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Task:
    """What an actor does in one go.

    Attributes:
        update: the job, see `JobFolder`.
        shard: of the job.
        retry: embed the failed rows of a shard that is there, not all rows of one that is missing.
        replace: make a shard again that is there.
        probe: embed these rows alone and keep nothing: does the process survive?
        skipped: rows that become failed rows without being read, and their reasons.
    """

    update: int
    shard: int
    retry: bool = False
    replace: bool = False
    probe: Sequence[int] | None = None
    skipped: Mapping[int, str] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """Whether it makes all rows of a shard that is missing."""
        return self == Task(self.update, self.shard)


@dataclass(frozen=True)
class Placed:
    """An actor's process has started, and has imported what it needs."""

    actor: int
    place: Place


@dataclass(frozen=True)
class Loaded:
    """An actor has loaded the encoder."""

    actor: int
    value: Any


@dataclass(frozen=True)
class Beat:
    """An actor runs. `progress` differs from the one before if it has done anything."""

    actor: int
    progress: Any


@dataclass(frozen=True)
class Ready:
    """An actor has read all inputs of its task ahead: it can begin to read those of the next."""

    actor: int


@dataclass(frozen=True)
class Finished:
    """A task is done, the first of those that the actor has."""

    actor: int
    result: dict[str, Any]


@dataclass(frozen=True)
class Raised:
    """Loading, or the first of its tasks, raised an error; the actor lives on."""

    actor: int
    error: Exception


@dataclass(frozen=True)
class Died:
    """An actor's process has ended.

    Attributes:
        reason: in words: "it was ended by SIGKILL".
        preempted: its machine was taken away, which is no fault of its task.
        with_node: its machine has failed, or was taken away without a word.
    """

    actor: int
    reason: str
    preempted: bool = False
    with_node: bool = False


Event = Placed | Loaded | Beat | Ready | Finished | Raised | Died


class Engine(Protocol):
    """Starts actors and carries tasks to them. An actor gets one task at a time, and one more once it is `Ready`; one
    thread calls all methods."""

    def start(self) -> int:
        """Start the process of an actor, at once or when there is room, and return its number; `Placed` will follow."""
        ...

    def load(self, actor: int, program: Program, begun: Mapping[str, str]) -> None:
        """Have an actor that is `Placed` load its encoder; `Loaded` will follow.

        Args:
            program: makes an object with the methods of `ShardMaker`; it is pickled.
            begun: the record of a job whose choices the encoder is loaded by, see `make_worker`.
        """
        ...

    def send(self, actor: int, task: Task) -> None:
        """Give a task to an actor that has none, or is ready for another."""
        ...

    def kill(self, actor: int) -> None:
        """End an actor; no event of it follows."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """Events in their order, as soon as there is one, none after so many seconds.

        Raises:
            LostEngineError: the engine itself has failed.
        """
        ...

    def exclude_node(self, node: str) -> None:
        """Start no more actors on a node."""
        ...

    def waiting_for(self) -> str:
        """What an actor that has not started waits for, in words."""
        ...

    def close(self) -> None:
        """End all actors, and the engine."""
        ...

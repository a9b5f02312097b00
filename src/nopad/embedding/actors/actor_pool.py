"""The actors of a run: which there are, what each is making, and that their encoders are alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nopad.embedding.actors.engine import Engine, Event, Loaded, Place, Placed, Program
from nopad.embedding.actors.work import Work

logger = logging.getLogger(__name__)

MAX_LOAD_DEATHS = 3
"""The job fails when so many processes one after another have died before they had loaded their encoder."""


@dataclass(eq=False)
class Actor:
    """The state of an actor, as far as its events show it.

    Attributes:
        place: `None` until its process has started.
        is_loading: loading its encoder was begun.
        is_loaded: it has its encoder.
        is_restart: it was started again, to load its encoder by the choices of the first actor.
        work: what it is making.
        next_work: what it makes after that, and reads already.
        is_ready: its inputs are read ahead, those of the next can be.
        progress, since: what its last heartbeat reported, and when that changed.
    """

    number: int
    since: float
    is_restart: bool = False
    place: Place | None = None
    is_loading: bool = False
    is_loaded: bool = False
    work: Work | None = None
    next_work: Work | None = None
    is_ready: bool = False
    progress: Any = None

    @property
    def node(self) -> str | None:
        return None if self.place is None else self.place.node

    def __str__(self) -> str:
        return "a process that had not started" if self.place is None else str(self.place)


class ActorPool:
    """The actors of a run.

    Their processes start at the same time; the first to be there loads its encoder first, the others by its choices.

    Args:
        program: of each, see `Engine.load`.
        started: numbers of actors that the engine has started.
        begun: the record of the job that was begun in the folder, by which the first actor is loaded.
        record: that of what loading returned; the other actors are loaded by the first one's.
        check: raises ValueError where the record of an actor is not that of the first.

    Attributes:
        first: what loading the first actor returned.
    """

    def __init__(
        self,
        engine: Engine,
        program: Program,
        *,
        started: Sequence[int] = (),
        begun: Mapping[str, str],
        record: Callable[[Any], Mapping[str, str]],
        check: Callable[[Mapping[str, str], Mapping[str, str]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.first: Any = None
        self._program = program
        self._begun = begun
        self._record = record
        self._check = check
        self._actors = {number: Actor(number, clock()) for number in started}
        self._load_deaths = 0

    def __len__(self) -> int:
        return len(self._actors)

    def __contains__(self, actor: Actor) -> bool:
        return actor.number in self._actors

    def get(self, number: int) -> Actor | None:
        """An actor, `None` where it has been ended."""
        return self._actors.get(number)

    def all(self) -> list[Actor]:
        return [*self._actors.values()]

    def idle(self) -> list[Actor]:
        """Actors that wait for work."""
        return [actor for actor in self._actors.values() if actor.is_loaded and actor.work is None]

    def busy(self) -> list[Actor]:
        """Actors that are making something."""
        return [actor for actor in self._actors.values() if actor.work is not None]

    def ready(self) -> list[Actor]:
        """Actors that can begin to read another shard beside that which they make."""
        actors = [actor for actor in self.busy() if actor.is_ready and actor.next_work is None]
        return [actor for actor in actors if actor.work is not None and actor.work.is_shareable]

    def has_other_node(self, nodes: set[str]) -> bool:
        """Whether an actor runs on a node that is not among `nodes`, or starts, there perhaps."""
        return any(actor.node not in nodes for actor in self._actors.values())

    def start(self, *, is_restart: bool = False) -> None:
        """Start an actor."""
        number = self.engine.start()
        self._actors[number] = Actor(number, self.clock(), is_restart)

    def _load(self) -> None:
        """Have actors that are placed load their encoder, the first alone."""
        for actor in self._actors.values():
            if actor.place is None or actor.is_loading:
                continue
            if self.first is None and any(each.is_loading for each in self._actors.values()):
                return
            actor.is_loading, actor.since = True, self.clock()
            self.engine.load(
                actor.number, self._program, self._begun if self.first is None else self._record(self.first)
            )

    def remove(self, actor: Actor) -> None:
        """Forget an actor that has ended."""
        self._actors.pop(actor.number, None)
        self._load()

    def kill(self, actor: Actor) -> None:
        """End an actor."""
        self.remove(actor)
        self.engine.kill(actor.number)

    def started(self, actor: Actor, event: Event) -> None:
        """Take note that an actor's process runs, or has loaded its encoder.

        Raises:
            ValueError: by `check`; the message has its host.
        """
        actor.since = self.clock()
        if isinstance(event, Placed):
            actor.place = event.place
        elif isinstance(event, Loaded):
            self._load_deaths = 0
            actor.is_loaded = True
            self.first = event.value if self.first is None else self.first
            try:
                self._check(self._record(self.first), self._record(event.value))
            except ValueError as error:
                if actor.is_restart:
                    host = actor.place.host if actor.place else "a node"
                    raise ValueError(f"{host} has another checkpoint or installation: {error}") from None
                self.kill(actor)  # it made its own choices: of a capacity that fits its GPU, for example
                self.start(is_restart=True)
        self._load()

    def died_loading(self, actor: Actor, reason: str) -> None:
        """Count an actor that has died before it had its encoder.

        Raises:
            ChildProcessError: too many.
        """
        self._load_deaths += 1
        if self._load_deaths >= MAX_LOAD_DEATHS:
            raise ChildProcessError(
                f"actors: {MAX_LOAD_DEATHS} processes died while they loaded the encoder, the last was {actor}: "
                f"{reason}; too little memory? finished shards are kept"
            )
        logger.warning("actors: %s died while it loaded the encoder: %s; another is started", actor, reason)

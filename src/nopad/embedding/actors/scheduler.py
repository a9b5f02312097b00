"""Which actor makes which shard, and what happens where one dies, hangs or fails."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from nopad.embedding.actors import engine as events
from nopad.embedding.actors.actor_pool import Actor, ActorPool
from nopad.embedding.actors.engine import Event
from nopad.embedding.actors.nodes import NodeRecord, worse_node
from nopad.embedding.actors.work import Work
from nopad.storage.errors import UnusableStoreError

logger = logging.getLogger(__name__)

MAX_IDLE_SECONDS = 20.0
"""After this time without any actor at work a warning is logged, and again after twice, four times … as long."""

MAX_DEATHS_IN_A_ROW = 20
"""The job fails when so many processes for each actor have died, and no task was done meanwhile."""

POLL_SECONDS = 0.2

Outcome = tuple[Work, dict[str, Any] | None]
"""A shard with its result, `None` where it is given up."""


class Scheduler:
    """Gives shards to actors until all are made or given up.

    An actor gets a shard once it has loaded its encoder, and the next once it has read all inputs of that: a shard that
    waits longer could be made by an actor that is idle. After a stop only shards that are encoded are waited for.

    Args:
        max_actors: as many are started, and as there are shards, when there is room for them.
        stall: seconds without progress after which a shard is made elsewhere, `None` for no limit.
        stop: once set, only shards in hand are finished.
    """

    def __init__(
        self,
        pool: ActorPool,
        max_actors: int,
        *,
        stall: float | None,
        stop: threading.Event,
    ) -> None:
        self.pool = pool
        self.max_actors = max_actors
        self.stall = stall
        self.stop = stop
        self._nodes = NodeRecord()
        self._retries: deque[Work] = deque()
        self._new: Iterator[Work] = iter(())
        self._next: Work | None = None
        self._num_left = 0
        self._outcomes: list[Outcome] = []
        self._with_failures: defaultdict[str, dict[tuple[int, int], Work]] = defaultdict(dict)
        self._excluded: set[str] = set()
        self._deaths_in_a_row = 0
        self._idle_since, self._idle_limit = pool.clock(), MAX_IDLE_SECONDS

    def load(self, number: int = 1) -> Any:
        """Start the actors for `number` shards, and return what loading the first returned; `None` after a stop."""
        self._idle_since = self.pool.clock()
        while self.pool.first is None and not self.stop.is_set():
            self._start(number)
            self._step()
        return self.pool.first

    def make(self, works: Iterable[Work], number: int) -> Iterator[Outcome]:
        """Make `number` shards; each comes once it is done, and again where another node makes it again.

        Raises:
            ChildProcessError: actors die whatever they do.
            Exception: what an actor raised.
        """
        self._new, self._num_left = iter(works), number
        self._with_failures.clear()
        self._advance()
        self._idle_since = self.pool.clock()
        while self.pool.busy() or (self._has_waiting() and not self.stop.is_set()):
            if not self.stop.is_set():
                self._start(self._num_left)
                self._assign()
            self._step()
            outcomes, self._outcomes = self._outcomes, []
            yield from outcomes

    def _start(self, number: int) -> None:
        while len(self.pool) < min(self.max_actors, max(1, number)):
            self.pool.start()

    def _step(self) -> None:
        for event in self.pool.engine.wait(POLL_SECONDS):
            if (actor := self.pool.get(event.actor)) is not None:  # else it was killed meanwhile
                self._handle(actor, event)
        self._end_stalls()
        self._warn_if_idle()

    def _has_waiting(self) -> bool:
        return self._next is not None or bool(self._retries)

    def _advance(self) -> None:
        self._next = next(islice(self._new, 1), None)

    def _assign(self) -> None:
        for actor in self.pool.idle():
            if (work := self._take(actor)) is not None:
                actor.work, actor.since, actor.progress, actor.is_ready = work, self.pool.clock(), None, False
                self.pool.engine.send(actor.number, work.task)
        for actor in self.pool.ready():
            if (work := self._next) is not None and work.is_shareable:
                self._advance()
                actor.next_work, actor.is_ready = work, False
                self.pool.engine.send(actor.number, work.task)

    def _take(self, actor: Actor) -> Work | None:
        """The next shard for an actor: one that went wrong on its node goes to another, if there is one."""
        for work in [*self._retries]:
            if actor.node in work.avoid and self.pool.has_other_node(work.avoid):
                continue
            self._retries.remove(work)
            if work.compared is None or actor.node not in work.avoid:
                return work
            # Nobody is left to compare with: it stays as it is.
        work = self._next
        self._advance()
        return work

    def _handle(self, actor: Actor, event: Event) -> None:
        match event:
            case events.Placed() | events.Loaded():
                try:
                    self.pool.started(actor, event)
                except ValueError as error:
                    self._exclude_or_raise(actor, error)
            case events.Beat():
                # A download may take long: an actor that loads need only be alive.
                if event.progress != actor.progress or actor.work is None:
                    actor.progress, actor.since = event.progress, self.pool.clock()
            case events.Ready():
                actor.is_ready = True
            case events.Finished():
                self._deaths_in_a_row = 0
                work, actor.work, actor.next_work = actor.work, actor.next_work, None
                actor.since = self.pool.clock()
                assert work is not None
                self._finished(actor, work, event.result)
                if actor.work is not None and self.stop.is_set() and actor in self.pool:
                    self.pool.kill(actor)
                    self._put_back_all(actor)
            case events.Raised():
                self._raised(actor, event.error)
            case events.Died():
                self._died(actor, event)

    def _finished(self, actor: Actor, work: Work, result: dict[str, Any]) -> None:
        if work.is_probe:
            work.survived()
            self._put_back(work)
            return
        assert actor.node is not None
        if reason := result.get("unmade"):
            is_last = not self.pool.has_other_node({actor.node, *work.avoid})
            self._attempt_failed(
                actor, work, work.failed(str(actor), reason, is_last=is_last), f"is not made: {reason}"
            )
            return
        key, failed = (work.task.update, work.task.shard), result["num_failed"]
        worse = None if work.compared is None else worse_node(work.compared, (actor.node, failed))
        if work.compared is None:
            self._num_left -= 1
        else:
            self._with_failures[work.compared[0]].pop(key, None)
        self._outcomes.append((work, result))
        if failed:
            self._with_failures[actor.node][key] = work
        for node in self._nodes.made(actor.node, work.avoid if work.compared is None else ()):
            self._exclude_node(node, "shards that went wrong there are made elsewhere")
        if worse is not None:
            self._exclude_node(worse, f"most inputs of {work.name} failed there, and not elsewhere")
        elif work.compared is None and self._nodes.should_compare(actor.node, result["rows"], failed):
            again = work.again()
            again.compared = actor.node, failed
            again.avoid = {actor.node}
            if self.pool.has_other_node(again.avoid):
                self._retries.append(again)

    def _raised(self, actor: Actor, error: Exception) -> None:
        # A store may be refused for the credentials in the environment of one node.
        if actor.work is None or isinstance(error, (events.NodeError, UnusableStoreError)):
            self._exclude_or_raise(actor, error)
        else:
            raise error

    def _died(self, actor: Actor, event: events.Died) -> None:
        self.pool.remove(actor)
        work = actor.work
        is_shared = actor.next_work is not None
        if event.preempted or (event.with_node and (work is None or is_shared or work.lost_node())):
            logger.warning("actors: %s was lost with its machine: %s", actor, event.reason)
            self._put_back_all(actor, alone=not event.preempted)
            return
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row >= MAX_DEATHS_IN_A_ROW * (1 + len(self.pool)):
            raise ChildProcessError(
                f"actors: {self._deaths_in_a_row} processes died one after another and no shard was made, the last was "
                f"{actor}: {event.reason}; too little memory, or a GPU or driver that fails? finished shards are kept"
            )
        if work is None:
            self.pool.died_loading(actor, event.reason)
        elif is_shared:
            self._attempts_failed(actor, f"died: {event.reason}")
        else:
            self._attempt_failed(actor, work, work.died(str(actor), event.reason), f"died: {event.reason}")

    def _end_stalls(self) -> None:
        if self.stall is None:
            return
        for actor in self.pool.all():
            if not actor.is_loading or self.pool.clock() - actor.since < self.stall or actor in self.pool.idle():
                continue
            self.pool.kill(actor)
            reason = f"no progress in {self.stall:g} s"
            if actor.work is None:
                self.pool.died_loading(actor, reason)
            elif actor.next_work is not None:
                self._attempts_failed(actor, reason)
            else:
                self._attempt_failed(actor, actor.work, actor.work.stalled(str(actor), self.stall), reason)

    def _attempt_failed(self, actor: Actor, work: Work, what_is_done: str, reason: str) -> None:
        logger.warning("%s: %s (%s); %s", work.name, reason, actor, what_is_done)
        if actor.node is not None:
            work.avoid.add(actor.node)
        if not work.not_made:
            self._put_back(work)
        elif work.compared is None:
            self._num_left -= 1
            self._outcomes.append((work, None))

    def _attempts_failed(self, actor: Actor, reason: str) -> None:
        """Put both shards of an actor back, either of which may be why; neither is counted as failed."""
        names = " and ".join(work.name for work in (actor.work, actor.next_work) if work is not None)
        logger.warning("%s: %s (%s); each is made again alone", names, reason, actor)
        self._put_back_all(actor, alone=True)

    def _put_back(self, work: Work) -> None:
        self._retries.appendleft(work)

    def _put_back_all(self, actor: Actor, *, alone: bool = False) -> None:
        for work in (actor.next_work, actor.work):
            if work is not None:
                work.is_alone = work.is_alone or alone
                self._put_back(work)

    def _exclude_or_raise(self, actor: Actor, error: Exception) -> None:
        """Set the node of an actor aside, where there are others.

        Raises:
            Exception: the error, where there are none.
        """
        is_first = self.pool.first is None  # others have not even begun to load
        if is_first or actor.node is None or not self.pool.has_other_node({actor.node}):
            raise error
        self._exclude_node(actor.node, str(error))

    def _exclude_node(self, node: str, why: str) -> None:
        """Use a node no more, and make its shards with failed rows again on others; unless it is the only one."""
        if node in self._excluded or not self.pool.has_other_node({node}):
            return
        self._excluded.add(node)
        there = [actor for actor in self.pool.all() if actor.node == node]
        host = next((actor.place.host for actor in there if actor.place), node)
        again = self._with_failures.pop(node, {}).values()
        # Among these are those that wait to be compared.
        self._retries = deque(work for work in self._retries if not work.compared or work.compared[0] != node)
        logger.warning("actors: %s is set aside: %s; %d of its shards are made again", host, why, len(again))
        self.pool.engine.exclude_node(node)
        for actor in there:
            self.pool.kill(actor)
            self._put_back_all(actor)
        for work in again:
            redone = work.again()
            redone.avoid = {node}
            redone.compared = None
            self._num_left += 1
            self._retries.append(redone)

    def _warn_if_idle(self) -> None:
        now = self.pool.clock()
        if any(actor.place is not None for actor in self.pool.all()):
            self._idle_since, self._idle_limit = now, MAX_IDLE_SECONDS
        elif now - self._idle_since >= self._idle_limit:
            logger.warning(
                "actors: none has started in %.0f s: %s", now - self._idle_since, self.pool.engine.waiting_for()
            )
            self._idle_limit *= 2

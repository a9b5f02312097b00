"""A shard that is to be made, and what went wrong with it so far."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nopad.counts import counted
from nopad.embedding.actors.bisection import find_fatal
from nopad.embedding.actors.engine import Task

MAX_STALLS = 2
"""A shard that made no progress in so many processes is not made."""

MAX_ERRORS = 3
"""A shard of which so many attempts failed is not made."""

MAX_LOST_NODES = 3
"""When so many machines have failed over a shard, it counts as a death."""

MAX_DEATHS = 2
"""When so many processes have died over a shard, the image that ends them is searched."""


@dataclass(eq=False)
class Work:
    """A shard to make, to retry or to make again.

    Attributes:
        task: as it is given to an actor next.
        name: of the shard's file.
        rows: returns those that the task embeds; none where they are not known.
        compared: the node that has made it, and how many rows failed there; another is to make it as well.
        avoid: nodes where it went wrong.
        is_alone: its actor reads no other beside it: a process has died that had two.
        not_made: why it is given up.
    """

    task: Task
    name: str
    rows: Callable[[], Sequence[int]]
    compared: tuple[str, int] | None = None
    avoid: set[str] = field(default_factory=set)
    is_alone: bool = False
    not_made: str = ""
    _deaths: int = 0
    _errors: int = 0
    _lost_nodes: int = 0
    _stalls: int = 0
    _was_searched: bool = False
    _search: Generator[Sequence[int], bool, int | None] | None = None

    @property
    def is_probe(self) -> bool:
        """Whether its task keeps nothing."""
        return self.task.probe is not None

    @property
    def is_shareable(self) -> bool:
        """Whether its actor may read another shard beside it: nothing has gone wrong with it."""
        failures = self._deaths + self._errors + self._lost_nodes + self._stalls
        return self.task.is_plain and not self.is_alone and not failures

    def survived(self) -> None:
        """A probe is done."""
        self._go_on(survived=True, reason="")

    def died(self, place: str, reason: str) -> str:
        """Its process has ended by itself; what is done about that, in words."""
        self._deaths += 1
        if self._search is not None:
            self._go_on(survived=False, reason=reason)
            return "its images are tried in parts"
        if self._deaths < MAX_DEATHS:
            return "it is made again"
        if self._was_searched:
            self.not_made = (
                f"{place} died while it made it: {reason}; with its images in parts none did: is memory short?"
            )
            return "it is left to the next run"
        rows = [row for row in self.rows() if row not in self.task.skipped]
        if not rows:
            self.not_made = f"{place} died while it made it: {reason}; its images are not known"
            return "it is left to the next run"
        self._was_searched = True
        self._search = find_fatal(rows)
        self._probe(next(self._search))
        return "its images are tried in parts"

    def lost_node(self) -> bool:
        """Its machine has failed; whether that may be no fault of it."""
        self._lost_nodes += 1
        return self._lost_nodes < MAX_LOST_NODES

    def stalled(self, place: str, seconds: float) -> str:
        """Its process has made no progress; what is done about that, in words."""
        self._stalls += 1
        if self._stalls < MAX_STALLS:
            return "it is made elsewhere"
        self.not_made = f"no progress in {seconds:g} s, in {counted(self._stalls, 'process')}, the last was {place}"
        return "it is left to the next run"

    def failed(self, place: str, reason: str, *, is_last: bool) -> str:
        """An input of it could not be reached; what is done about that, in words.

        Args:
            is_last: no other node is left to try.
        """
        self._errors += 1
        if self._errors < MAX_ERRORS and not is_last:
            return "it is made elsewhere"
        self.not_made = reason if self._errors == 1 else f"{reason} (the last of {self._errors} attempts, by {place})"
        return "it is left to the next run"

    def _go_on(self, *, survived: bool, reason: str) -> None:
        assert self._search is not None
        try:
            self._probe(self._search.send(survived))
        except StopIteration as end:
            self._search = None
            self._probe(None)
            self._deaths = MAX_DEATHS - 1
            if end.value is not None:
                self._was_searched = False  # there may be another such image
                reason = f"the process that embedded it died, also with it alone: {reason}"
                self._set(skipped={**self.task.skipped, end.value: reason})

    def _probe(self, rows: Sequence[int] | None) -> None:
        self._set(probe=rows)

    def _set(self, **changes: Any) -> None:
        self.task = replace(self.task, **changes)

    def again(self) -> Work:
        """The same shard once more, though it is there."""
        task = Task(self.task.update, self.task.shard, self.task.retry, replace=True, skipped=self.task.skipped)
        return Work(task, self.name, self.rows, avoid={*self.avoid})

"""Files that wait for a decode process."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.memory import MemoryReservation
from nopad.pipeline.process_server import Attempts

MAX_BATCH = 8
"""Files that a process is sent at once, where they are quick to decode."""

FIRST_BATCH = 2
"""The same for the first of each process; from round to round it doubles. The encoder waits for the first images."""

Done = Callable[[PreparedImage | Exception, float], None]
"""Takes what became of an input, and for how many seconds a process worked on it."""


@dataclass(eq=False, slots=True)
class Task:
    """A file to decode.

    Attributes:
        alone: whether it must be in no batch.
        number: its place in the order.
        attempts: counts the processes that decoded it alone.
    """

    data: Any
    reservation: MemoryReservation
    done: Done
    alone: bool
    number: int = 0
    attempts: Attempts = field(default_factory=Attempts)


class DecodeQueue:
    """Tasks in the order in which they came: memory is granted in that, and to none before the first."""

    def __init__(self) -> None:
        self._tasks: deque[Task] = deque()
        self._numbers = itertools.count()
        self._takes = 0

    def __len__(self) -> int:
        return len(self._tasks)

    def append(self, task: Task) -> None:
        """Add a task behind all others."""
        task.number = next(self._numbers)
        self._tasks.append(task)

    def take(self, processes: int) -> list[Task]:
        """The next task, with those behind it where they are quick: so many that all processes get the same number."""
        rounds, self._takes = self._takes // processes, self._takes + 1
        size = min(FIRST_BATCH << min(rounds, MAX_BATCH), MAX_BATCH, -(-len(self._tasks) // processes))
        tasks = [self._tasks.popleft()]
        while len(tasks) < size and _go_together(tasks[0], self._tasks[0]):
            tasks.append(self._tasks.popleft())
        tasks[0].alone |= len(tasks) == 1
        return tasks

    def put_back(self, tasks: list[Task]) -> None:
        """Put back tasks that are each tried alone, their reservations given up."""
        for task in tasks:
            task.alone = True
            task.reservation.renounce()
        self._tasks = deque(sorted([*tasks, *self._tasks], key=attrgetter("number")))

    def take_all(self) -> list[Task]:
        """All tasks; none is left."""
        tasks, self._tasks = list(self._tasks), deque()
        return tasks


def _go_together(first: Task, second: Task) -> bool:
    """Whether they may be in one batch; a run that has ended may have left files before those of the next."""
    return not (first.alone or second.alone) and first.reservation.budget is second.reservation.budget

"""Bytes that images take between their file and their pack: a bound on them, and how much memory there is."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from nopad.preprocessing.decode import ImageError

SHARE = 0.5
"""Of the memory that is free when a worker starts: the default bound."""

_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int:
    """Bytes that this process can still have: free on the machine, and in its container."""
    free = [_free_on_machine()]
    for limit, used in _CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such file, or "max"
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(0, min(free))


def _free_on_machine() -> int:
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class MemoryBudget:
    """Bounds the bytes of images that are being decoded or wait for their pack.

    Reservations are granted in the order in which they were made: the image that the packer waits for is never behind
    later ones. One that exceeds what is left is granted once nothing else is being decoded, so that the largest images
    are decoded alone.

    Args:
        limit: bytes; `SHARE` of what is free by default.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(available_memory() * SHARE) if limit is None else limit
        if self.limit < 1:
            raise ValueError(f"memory: expected bytes ≥ 1, got {self.limit}")
        self.changed = threading.Condition()
        self.used = 0
        self.decoding = 0
        self.turn = 0
        self.closed = False
        self.passed: set[int] = set()
        self._tickets = 0

    def reservation(self) -> Reservation:
        """The next in the order."""
        self._tickets += 1
        return Reservation(self, self._tickets - 1)

    def close(self) -> None:
        """Refuse what still waits."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Reservation:
    """The bytes of one image."""

    def __init__(self, budget: MemoryBudget, ticket: int) -> None:
        self._budget = budget
        self._ticket = ticket
        self._granted = False
        self._held = 0

    def reserve(self, size: int) -> None:
        """Wait until there is room for the peak of decoding.

        Raises:
            ImageError: more than the whole budget, or the budget was closed.
        """
        budget = self._budget
        if self._granted:
            return
        if size > budget.limit:
            raise ImageError(
                "image",
                f"decoding it takes about {size / 1e6:,.0f} MB of memory, expected at most {budget.limit / 1e6:,.0f}; "
                f"set decode_memory to more",
            )
        with budget.changed:
            budget.changed.wait_for(lambda: budget.closed or self._is_next(size))
            if budget.closed:
                raise ImageError("image", "not decoded: the run has ended")
            budget.used += size
            budget.decoding += 1
            self._granted, self._held = True, size
            self._pass()

    def settle(self, size: int) -> None:
        """Decoding is over, and its result takes `size` bytes."""
        with self._budget.changed:
            if not self._granted:
                self._pass()
                return
            self._budget.decoding -= 1
            self._budget.used += size - self._held
            self._held = size
            self._budget.changed.notify_all()

    def release(self) -> None:
        """The result has gone into a pack."""
        with self._budget.changed:
            self._budget.used -= self._held
            self._held = 0
            self._budget.changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether the run that it belongs to has ended."""
        return self._budget.closed

    def _is_next(self, size: int) -> bool:
        budget = self._budget
        return budget.turn == self._ticket and (budget.decoding == 0 or budget.used + size <= budget.limit)

    def _pass(self) -> None:
        """Let the next reservation have its turn, now or, where this one was not yet next, later."""
        budget = self._budget
        budget.passed.add(self._ticket)
        while budget.turn in budget.passed:
            budget.passed.remove(budget.turn)
            budget.turn += 1
        budget.changed.notify_all()

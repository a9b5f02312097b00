"""A bound on the bytes of images between file and pack, and the memory that is free."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nopad.preprocessing.decode import ImageError

MEMORY_FRACTION = 0.5
"""Default bound, as a fraction of the memory that is free when a worker starts."""

MAX_ALLOWANCE_BYTES = 1 << 25
"""Most that an image may take before its size is known: photos of up to three megapixels."""

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


@dataclass(frozen=True)
class Unread:
    """A file of so many bytes that it is read once there is memory for it."""

    size: int
    read: Callable[[], Any]


@dataclass(frozen=True)
class Remote:
    """A file that is fetched over a network, in a thread: waiting takes longer than anything else.

    Attributes:
        fetch: returns what a decoder takes, or that as `Unread`.
    """

    fetch: Callable[[], Any]


class MemoryBudget:
    """Bounds the bytes of images that are being decoded or wait for their pack.

    Reservations are granted in the order in which they were made: the image that the packer waits for is never behind
    later ones. One that exceeds what is left is granted once nothing else is being decoded, so that the largest images
    are decoded alone.

    Args:
        limit: bytes; `MEMORY_FRACTION` of what is free by default.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(available_memory() * MEMORY_FRACTION) if limit is None else limit
        if self.limit < 1:
            raise ValueError(f"memory: expected bytes ≥ 1, got {self.limit}")
        self.changed = threading.Condition()
        self.used = 0
        self.decoding = 0
        self.next_ticket = 0
        self.closed = False
        self.served: set[int] = set()  # tickets behind `next_ticket`, out of order
        self._tickets = 0
        self._listeners: set[Callable[[], None]] = set()

    def allowance(self, parallel: int) -> int:
        """Bytes that each of so many images may take before its size is known; together a quarter of the limit."""
        return min(MAX_ALLOWANCE_BYTES, self.limit // (4 * parallel))

    def reservation(self) -> MemoryReservation:
        """A new reservation, granted after all earlier ones."""
        self._tickets += 1
        return MemoryReservation(self, self._tickets - 1)

    def try_reserve_all(self, reservations: Sequence[MemoryReservation], size: int, notify: Callable[[], None]) -> bool:
        """Reserve `size` bytes for each of some images, in their order, or for none where they are not free for all.

        With a part of them granted a larger image before them would wait for these, and the rest for that one.

        Raises:
            ImageError: see `MemoryReservation.reserve`.
        """
        reservations[0].check(size)
        with self.changed:
            if not reservations[0].can_take(size * len(reservations)):
                self.listen(notify)
                return False
            for reservation in reservations:
                reservation.take(size, decoding=True)
            return True

    def close(self) -> None:
        """Refuse all reservations that are not granted yet."""
        with self.changed:
            self.closed = True
            self.notify()

    def listen(self, notify: Callable[[], None]) -> None:
        """Call `notify` at the next change; under the lock of `changed`."""
        self._listeners.add(notify)

    def notify(self) -> None:
        """Wake who waits for a change; under the lock of `changed`."""
        self.changed.notify_all()
        while self._listeners:
            self._listeners.pop()()


class MemoryReservation:
    """The bytes of one image: of its file where that is large, then of decoding it, then of the result.

    Its states, in order; `release` ends it from any of them:

    - waiting: no bytes, or those of the file after `hold`; all later reservations wait behind it;
    - decoding, after `reserve`: the peak of decoding, and the next reservation is served; `renounce` goes back;
    - decoded, after `finish_decoding`: the bytes of the result.

    Attributes:
        budget: the budget that it is made of.
    """

    def __init__(self, budget: MemoryBudget, ticket: int) -> None:
        self.budget = budget
        self._ticket = ticket
        self._granted = False
        self._held = 0

    def hold(self, size: int) -> None:
        """Wait until `size` bytes, those of the file, are free. Until `reserve` all later images wait.

        Raises:
            ImageError: more than the whole budget, or the budget was closed.
        """
        self._wait(size, decoding=False)

    def reserve(self, size: int) -> None:
        """Wait until `size` bytes, the peak of decoding with the file, are free.

        Raises:
            ImageError: more than the whole budget, or the budget was closed.
        """
        self._wait(size, decoding=True)

    def try_hold(self, size: int, notify: Callable[[], None]) -> bool:
        """Hold as `hold` does where `size` bytes are free; where not, `notify` is called when some may be.

        Raises:
            ImageError: see `hold`.
        """
        return self._try(size, notify, decoding=False)

    def try_reserve(self, size: int, notify: Callable[[], None]) -> bool:
        """Reserve as `reserve` does where `size` bytes are free; where not, `notify` is called when some may be.

        Raises:
            ImageError: see `reserve`.
        """
        return self._try(size, notify, decoding=True)

    def _wait(self, size: int, *, decoding: bool) -> None:
        self.check(size)
        if self._granted:
            return
        with self.budget.changed:
            self.budget.changed.wait_for(lambda: self.can_take(size))
            self.take(size, decoding=decoding)

    def _try(self, size: int, notify: Callable[[], None], *, decoding: bool) -> bool:
        self.check(size)
        if self._granted:
            return True
        with self.budget.changed:
            if not self.can_take(size):
                self.budget.listen(notify)
                return False
            self.take(size, decoding=decoding)
            return True

    def check(self, size: int) -> None:
        """Raise `ImageError` for more than the whole budget."""
        budget = self.budget
        if size > budget.limit:
            raise ImageError(
                "image",
                f"decoding it takes about {size / 1e6:,.0f} MB of memory, expected at most {budget.limit / 1e6:,.0f}; "
                f"set decode_memory to more",
            )

    def take(self, size: int, *, decoding: bool) -> None:
        """Reserve; under the lock of the budget's `changed`, once `can_take` allows it."""
        budget = self.budget
        if budget.closed:
            raise ImageError("image", "not decoded: the run has ended")
        budget.used += size - self._held
        self._held = size
        if decoding:
            budget.decoding += 1
            self._granted = True
            self._serve_next()

    def renounce(self) -> None:
        """Give back what was reserved before the size was known; a repeated request is granted next."""
        with self.budget.changed:
            if not self._granted:
                return
            budget, self._granted = self.budget, False
            budget.used -= self._held
            budget.decoding -= 1
            self._held = 0
            budget.served.update(range(self._ticket, budget.next_ticket))
            budget.served.discard(self._ticket)
            budget.next_ticket = min(budget.next_ticket, self._ticket)
            budget.notify()

    def finish_decoding(self, size: int) -> None:
        """Reduce the reservation to the `size` bytes of the result."""
        with self.budget.changed:
            if not self._granted:
                size = 0
            self.budget.used += size - self._held
            self._held = size
            if self._granted:
                self.budget.decoding -= 1
                self.budget.notify()
            else:
                self._serve_next()

    def release(self) -> None:
        """Give the bytes back; the result is in a pack."""
        with self.budget.changed:
            self.budget.used -= self._held
            self._held = 0
            self.budget.notify()

    @property
    def is_closed(self) -> bool:
        """Whether the run that it belongs to has ended."""
        return self.budget.closed

    def can_take(self, size: int) -> bool:
        """Whether a reservation of `size` bytes is granted or refused now."""
        budget = self.budget
        if budget.closed:
            return True
        used = budget.used - self._held
        return budget.next_ticket == self._ticket and (budget.decoding == 0 or used + size <= budget.limit)

    def _serve_next(self) -> None:
        """Mark this reservation as served, and advance to the first that is not."""
        budget = self.budget
        budget.served.add(self._ticket)
        while budget.next_ticket in budget.served:
            budget.served.remove(budget.next_ticket)
            budget.next_ticket += 1
        budget.notify()

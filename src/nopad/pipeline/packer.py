"""From images to packs: which of them share one, so that packs are full and the order stays near the input's."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Generic, TypeVar

Item = TypeVar("Item")

LOOK_AHEAD = 4
"""How many packs' worth of images a planner looks ahead, unless told otherwise."""


class Planner(Generic[Item]):
    """Fills packs with items as they come in: best fit within a look-ahead window.

    A pack begins with the item that has waited longest, so that none waits for ever, and takes the largest waiting item
    that fits until none does. What goes into which pack depends on the lengths and their order alone, never on time.

    Args:
        capacity: patches of a full pack; an item that is longer gets a pack of its own.
        look_ahead: patches that wait before a pack is closed, in packs.
        most: items of a pack, any number unless given.

    Raises:
        ValueError: a capacity below 1 or a look-ahead below 1.
    """

    def __init__(self, capacity: int, *, look_ahead: float = LOOK_AHEAD, most: int | None = None):
        if capacity < 1 or look_ahead < 1:
            raise ValueError(f"expected capacity ≥ 1 and look_ahead ≥ 1, got {capacity} and {look_ahead}")
        self.capacity = capacity
        self._most = most
        self._window = capacity * look_ahead
        self._items: dict[int, tuple[int, Item]] = {}  # in the order of their coming
        self._by_length: list[tuple[int, int]] = []  # (length, -number): of equals, the earlier is the better fit
        self._waiting = 0
        self._number = 0

    def add(self, length: int, item: Item) -> Iterator[list[Item]]:
        """Take an item; gives the packs that this closes.

        Raises:
            ValueError: a length below 1.
        """
        if length < 1:
            raise ValueError(f"length: expected ≥ 1, got {length}")
        self._items[self._number] = (length, item)
        insort(self._by_length, (length, -self._number))
        self._number += 1
        self._waiting += length
        while self._waiting >= self._window:
            yield self._close()

    def finish(self) -> Iterator[list[Item]]:
        """Give the packs of all that still waits."""
        while self._items:
            yield self._close()

    def _close(self) -> list[Item]:
        """The next pack, its items in the order of their coming."""
        chosen = [self._leave(next(iter(self._items)))]
        room = self.capacity - chosen[0][1]
        while len(chosen) != self._most and (place := bisect_right(self._by_length, (room, 0))):
            chosen.append(self._leave(-self._by_length[place - 1][1]))
            room -= chosen[-1][1]
        return [item for _, _, item in sorted(chosen, key=itemgetter(0))]

    def _leave(self, number: int) -> tuple[int, int, Item]:
        """Take an item out of those that wait; gives its number, length and itself."""
        length, item = self._items.pop(number)
        del self._by_length[bisect_left(self._by_length, (length, -number))]
        self._waiting -= length
        return number, length, item


def plan(lengths: Sequence[int], capacity: int, *, look_ahead: float = LOOK_AHEAD) -> list[list[int]]:
    """The packs of a whole list of items, as indices.

    Raises:
        ValueError: see `Planner`.
    """
    planner: Planner[int] = Planner(capacity, look_ahead=look_ahead)
    packs = [pack for index, length in enumerate(lengths) for pack in planner.add(length, index)]
    return [*packs, *planner.finish()]

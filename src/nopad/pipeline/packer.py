"""From images to packs: which of them share one, so that packs are full and the order stays near the input's."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

LOOKAHEAD = 4
"""Default lookahead: the tokens that wait before a pack is closed, in packs."""
FIRST_LOOKAHEAD = 1
"""The same for the first pack: a GPU would wait for the images of all."""
ENOUGH_CHOICE = 32
"""Items beyond a full pack among which some always fit well; more would only wait."""


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Item]):
    number: int
    length: int
    segments: int
    item: Item


class BestFitPacker(Generic[Item]):
    """Online bin packing: best fit within a lookahead window.

    A pack begins with the item that has waited longest, so that none waits for ever, and takes the largest waiting item
    that fits until none does. The packs depend on the lengths and their order alone, never on time.

    Args:
        capacity: tokens of a full pack; a longer item gets a pack of its own.
        lookahead: tokens that wait before a pack is closed, in packs.
        first_lookahead: the same for the first pack; for each that follows it is one more, up to `lookahead`.
        enough_choice: items beyond a full pack with which one is closed in any case; `None` for no such number.
        max_segments: segments of a pack, any number by default; an item of more gets a pack of its own.

    Raises:
        ValueError: a capacity, a lookahead or `max_segments` below 1.
    """

    def __init__(
        self,
        capacity: int,
        *,
        lookahead: float = LOOKAHEAD,
        first_lookahead: float = FIRST_LOOKAHEAD,
        enough_choice: int | None = None,
        max_segments: int | None = None,
    ) -> None:
        if capacity < 1 or min(lookahead, first_lookahead) < 1 or (max_segments is not None and max_segments < 1):
            got = f"{capacity}, {lookahead} and {max_segments}"
            raise ValueError(f"expected capacity ≥ 1, lookahead ≥ 1 and max_segments ≥ 1, got {got}")
        self.capacity = capacity
        self._max_segments = max_segments
        self._enough_choice = enough_choice
        self._max_window = capacity * lookahead
        self._window = min(capacity * first_lookahead, self._max_window)
        self._items: dict[int, _Waiting[Item]] = {}  # in the order of arrival
        self._by_length: list[tuple[int, int]] = []  # (length, -number): of equals, the earlier is the better fit
        self._tokens = 0
        self._number = 0

    def add(self, length: int, item: Item, *, segments: int = 1) -> Iterator[list[Item]]:
        """Take an item of `length` tokens in so many `segments`, and yield the packs that this closes.

        Raises:
            ValueError: a length or a number of segments below 1.
        """
        if length < 1 or segments < 1:
            raise ValueError(f"expected length ≥ 1 and segments ≥ 1, got {length} and {segments}")
        self._items[self._number] = _Waiting(self._number, length, segments, item)
        insort(self._by_length, (length, -self._number))
        self._number += 1
        self._tokens += length
        while self._tokens >= self._window or self._has_enough_choice():
            yield self._close()

    def _has_enough_choice(self) -> bool:
        """Whether the items that wait, less so many of them of mean length, fill a pack."""
        waiting = len(self._items)
        return self._enough_choice is not None and (
            self._tokens * (waiting - self._enough_choice) >= self.capacity * waiting > 0
        )

    def finish(self) -> Iterator[list[Item]]:
        """Yield the packs of all that still waits."""
        while self._items:
            yield self._close()

    def _close(self) -> list[Item]:
        """The next pack, its items in the order of arrival."""
        self._window = min(self._window + self.capacity, self._max_window)
        chosen = [self._remove(next(iter(self._items)))]
        tokens = self.capacity - chosen[0].length
        segments = None if self._max_segments is None else self._max_segments - chosen[0].segments
        while (number := self._best_fit(tokens, segments)) is not None:
            chosen.append(self._remove(number))
            tokens -= chosen[-1].length
            segments = None if segments is None else segments - chosen[-1].segments
        return [one.item for one in sorted(chosen, key=attrgetter("number"))]

    def _best_fit(self, tokens: int, segments: int | None) -> int | None:
        """The longest waiting item that fits, of equals the earliest."""
        if segments is not None and segments < 1:
            return None
        for place in range(bisect_right(self._by_length, (tokens, 0)) - 1, -1, -1):
            number = -self._by_length[place][1]
            if segments is None or self._items[number].segments <= segments:
                return number
        return None

    def _remove(self, number: int) -> _Waiting[Item]:
        one = self._items.pop(number)
        del self._by_length[bisect_left(self._by_length, (one.length, -number))]
        self._tokens -= one.length
        return one


def best_fit(lengths: Sequence[int], capacity: int, **options: Any) -> list[list[int]]:
    """The packs of a whole list of items, as indices; `options` as `BestFitPacker` takes them.

    Raises:
        ValueError: see `BestFitPacker`.
    """
    packer: BestFitPacker[int] = BestFitPacker(capacity, **options)
    packs = [pack for index, length in enumerate(lengths) for pack in packer.add(length, index)]
    return [*packs, *packer.finish()]

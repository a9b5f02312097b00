"""The results of groups of images, taken in order as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from nopad.pipeline.pack_runner import EmbeddingResult


@dataclass(frozen=True)
class Part:
    """Results of images of a group that follow each other, and whether they are its last."""

    results: list[EmbeddingResult]
    is_last: bool


@dataclass(eq=False)
class Group:
    """The results of a group so far.

    Attributes:
        results: those that were not taken, by their places in the group.
        size: how many images it has, as far as they are read.
        is_whole: all of them are.
        num_taken: results that were taken.
    """

    results: dict[int, EmbeddingResult] = field(default_factory=dict)
    size: int = 0
    is_whole: bool = False
    num_taken: int = 0

    def take(self) -> Part:
        """The results that follow those that were taken."""
        results = []
        while (result := self.results.pop(self.num_taken, None)) is not None:
            results.append(result)
            self.num_taken += 1
        return Part(results, self.is_whole and self.num_taken == self.size)


def parts_of(groups: deque[Group]) -> Iterator[Part]:
    """Take the results from the front that are there, and the groups that have all of theirs."""
    while groups:
        part = groups[0].take()
        if part.is_last:
            groups.popleft()
        if part.results or part.is_last:
            yield part
        if not part.is_last:
            return

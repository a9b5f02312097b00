"""Which machines do far worse than others with the same shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

MIN_FAILED_SHARE = 0.5
"""Of a shard's rows: when more have failed, another node makes it, too."""

MIN_FAULTS, MIN_FAULT_RATE, MAX_FAULT_RATIO = 3, 0.2, 4.0
"""A node is set aside for so many shards that went wrong there and not elsewhere, so large a part of its shards, and so
many times the others' part."""


class NodeRecord:
    """What went wrong on each node and went well on another.

    Failed rows alone say nothing about a node: a folder of damaged files fails everywhere. So a shard of which most
    rows have failed is made by another node as well, and the two are compared: the first such shard of a node, then
    the second, the fourth, the eighth.
    """

    def __init__(self) -> None:
        self._faults: Counter[str] = Counter()
        self._made: Counter[str] = Counter()
        self._suspicious: Counter[str] = Counter()

    def should_compare(self, node: str, rows: int, failed: int) -> bool:
        """Whether another node should make a shard that this one has made."""
        if failed < max(1, MIN_FAILED_SHARE * rows):
            return False
        self._suspicious[node] += 1
        number = self._suspicious[node]
        return number & (number - 1) == 0

    def made(self, node: str, failed_on: Iterable[str]) -> list[str]:
        """Count a shard that a node has made after it went wrong on others; those of them to set aside."""
        self._made[node] += 1
        others = {*failed_on} - {node}
        self._faults.update(others)
        return [other for other in sorted(others) if self._is_far_above(other)]

    def _is_far_above(self, node: str) -> bool:
        faults, made = self._faults[node], self._made[node]
        rate = faults / (faults + made)
        others = self._faults.total() - faults
        rate_of_others = others / max(1, others + self._made.total() - made)
        return faults >= MIN_FAULTS and rate >= MIN_FAULT_RATE and rate > MAX_FAULT_RATIO * rate_of_others


def worse_node(first: tuple[str, int], second: tuple[str, int]) -> str | None:
    """The node that failed with far more rows of a shard than the other, `None` if neither did.

    Args:
        first, second: a node and its number of failed rows.
    """
    for (node, failed), (_, failed_elsewhere) in ((first, second), (second, first)):
        if failed > 0 and failed_elsewhere <= failed / 2:
            return node
    return None

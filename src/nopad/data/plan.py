"""Which samples share a pack, and which packs a step: every rank has a pack in each, of nearly the same cost."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from nopad.counts import check_count, is_number
from nopad.data.dropping import check_rate, num_retained
from nopad.data.samples import Sample, segment_lengths
from nopad.pipeline.pack_processor import PackProcessor
from nopad.pipeline.packer import LOOKAHEAD, BestFitPacker

Packed = list[Sample]
"""The samples of one pack."""

TOLERANCE = 0.01
"""Packs of a step that differ by less of the largest cost are left as they are."""
MAX_EXCHANGES = 8
"""In one step: each compares all pairs of samples of two packs."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes steps of samples: in each step one pack for every rank.

    Packs are full by best fit. Those of `window` steps are sorted by cost, and neighbours form a step, so that the
    ranks of a step finish together; then the steps are shuffled. Samples, their order and these attributes determine
    the result, so all ranks make the same plan without communication.

    Attributes:
        capacity: rows of a pack.
        max_segments: segments of a pack.
        world_size: ranks.
        window: steps that are planned at once.
        shuffle: whether the steps of a window are shuffled; else they are in the order of their first samples.
        cost: `(a, b)` of a segment's cost `a · n² + b · n`.
        drop_patches: part of a frame's patches that is dropped.

    Raises:
        ValueError: an attribute out of its range.
    """

    capacity: int
    max_segments: int
    world_size: int
    window: int
    shuffle: bool
    cost: tuple[float, float]
    drop_patches: float

    def __post_init__(self) -> None:
        for name in ("capacity", "max_segments", "world_size", "window"):
            check_count(name, getattr(self, name))
        check_rate(self.drop_patches)
        fits = isinstance(self.cost, Sequence) and len(self.cost) == 2
        if not fits or not all(is_number(each) and each >= 0 for each in self.cost):
            raise ValueError(f"cost: expected (a, b) of a · n² + b · n, two numbers ≥ 0, got {self.cost!r:.80}")

    def sample(
        self, number: int, frames: int, frame_patches: int, processor: PackProcessor, item: Any = None
    ) -> Sample:
        """A sample of so many patches a frame.

        Args:
            number, frames, frame_patches, item: see `Sample`.
            processor: makes its patches.
        """
        num_patches = num_retained(frame_patches, self.drop_patches) if self.drop_patches else frame_patches
        lengths = segment_lengths(processor, -(-frames // processor.temporal_patch_size), num_patches)
        quadratic, linear = self.cost
        cost = sum(quadratic * length**2 + linear * length for length in lengths)
        return Sample(number, frames, frame_patches, sum(lengths), len(lengths), cost, item)

    def steps(self, samples: Iterable[Sample], seed: str) -> Iterator[list[Packed]]:
        """The steps of an epoch, `world_size` packs each.

        The last steps may have packs that are less full. Samples are left out where fewer than `world_size` remain.

        Args:
            samples: samples in the order in which they are trained on.
            seed: seed of the shuffling of steps.

        Raises:
            ValueError: a sample that does not fit into a pack.
        """
        rng = random.Random(seed)
        # Sizes are known, so the first packs need not close before the window is full.
        options: dict[str, Any] = {"first_lookahead": LOOKAHEAD, "max_segments": self.max_segments}
        packer: BestFitPacker[Sample] = BestFitPacker(self.capacity, **options)
        packs: list[Packed] = []
        size = self.window * self.world_size
        for sample in samples:
            self._check(sample)
            packs += packer.add(sample.rows, sample, segments=sample.segments)
            while len(packs) >= size:
                yield from self._window(packs[:size], rng)
                del packs[:size]
        packs += packer.finish()
        for start in range(0, len(packs), size):
            yield from self._window(packs[start : start + size], rng)

    def warning(self, pack: Packed) -> str | None:
        """Warning where `max_segments` keeps a pack from being half full, else `None`."""
        if _segments(pack) < self.max_segments or 2 * _rows(pack) >= self.capacity:
            return None
        return (
            f"a pack has max_segments, {self.max_segments}, in {_rows(pack):,} of {self.capacity:,} tokens; "
            f"for small images give PackLoader and compile_for_training a larger one"
        )

    def _check(self, sample: Sample) -> None:
        if sample.rows > self.capacity or sample.segments > self.max_segments:
            raise ValueError(
                f"capacity: sample {sample.number} has {sample.rows:,} tokens in {sample.segments:,} segments, more "
                f"than a pack of {self.capacity:,} tokens and {self.max_segments:,} segments; raise capacity, or make "
                f"images smaller by max_patches= of nopad.processor"
            )

    def _window(self, packs: list[Packed], rng: random.Random) -> list[list[Packed]]:
        """Steps of packs that cost about the same."""
        if self.world_size == 1:
            steps = [[pack] for pack in packs]
        else:
            packs = sorted(packs, key=cost, reverse=True)
            packs += [[] for _ in range(-len(packs) % self.world_size)]
            starts = range(0, len(packs), self.world_size)
            steps = [self._levelled(packs[start : start + self.world_size]) for start in starts]
            steps = [step for step in steps if all(step)]
        for step in steps:
            rng.shuffle(step)
        if self.shuffle:
            rng.shuffle(steps)
        elif self.world_size > 1:
            steps.sort(key=lambda step: min(sample.number for pack in step for sample in pack))
        return steps

    def _levelled(self, packs: list[Packed]) -> list[Packed]:
        """The same samples in packs of more equal cost: the costliest hands one to the cheapest, or exchanges one."""
        packs = [list(pack) for pack in packs]
        exchanges = 0
        while True:
            packs.sort(key=cost)
            low, high = packs[0], packs[-1]
            if not low:  # which anything improves
                high = max(packs, key=lambda pack: (len(pack) > 1, cost(pack)))
            if cost(high) - cost(low) <= TOLERANCE * cost(high):
                return packs
            pair = self._pair(high, low, [None]) if len(high) > 1 else None
            if pair is None and exchanges < MAX_EXCHANGES:
                pair = self._pair(high, low, low)
                exchanges += 1
            if pair is None:
                return packs
            sent, returned = pair
            high.remove(sent)
            low.append(sent)
            if returned is not None:
                low.remove(returned)
                high.append(returned)

    def _pair(
        self, high: Packed, low: Packed, takeable: Sequence[Sample | None]
    ) -> tuple[Sample, Sample | None] | None:
        """The sample that `high` hands to `low`, and what of `takeable` goes the other way; `None` where none helps."""
        gap, best, pair = cost(high) - cost(low), math.inf, None
        rooms = [(self.capacity - _rows(pack), self.max_segments - _segments(pack)) for pack in (low, high)]
        for sent, returned in itertools.product(high, takeable):
            rows, segments, difference = sent.rows, sent.segments, sent.cost
            if returned is not None:
                rows, segments = rows - returned.rows, segments - returned.segments
                difference -= returned.cost
            distance = abs(difference - gap / 2)
            # A difference of the whole gap would only swap the two packs.
            if (
                distance < min(best, gap / 2)
                and _fits((rows, segments), rooms[0])
                and _fits((-rows, -segments), rooms[1])
            ):
                best, pair = distance, (sent, returned)
        return pair


def _fits(change: tuple[int, int], room: tuple[int, int]) -> bool:
    return change[0] <= room[0] and change[1] <= room[1]


def cost(pack: Packed) -> float:
    """Cost of all samples of a pack."""
    return sum(sample.cost for sample in pack)


def _rows(pack: Packed) -> int:
    return sum(sample.rows for sample in pack)


def _segments(pack: Packed) -> int:
    return sum(sample.segments for sample in pack)


@dataclass(frozen=True)
class PlanStatistics:
    """Statistics of a plan.

    Attributes:
        steps: number of steps of each rank.
        samples: number of samples in all packs.
        left_out: number of samples left out at the end, fewer than there are ranks.
        fill: rows of packs over their capacity, on average.
        balance: mean cost of a step's packs over the largest, averaged over steps: the part of the time in which ranks
            do not wait for each other.
    """

    steps: int
    samples: int
    left_out: int
    fill: float
    balance: float

    @classmethod
    def of(cls, steps: Iterable[list[Packed]], capacity: int, num_samples: int) -> PlanStatistics:
        """Statistics of an epoch's steps."""
        fills, balances, samples = [], [], 0
        for step in steps:
            costs = [cost(pack) for pack in step]
            fills += [_rows(pack) / capacity for pack in step]
            balances.append(fmean(costs) / max(costs))
            samples += sum(map(len, step))
        if not balances:
            return cls(0, 0, num_samples, 0.0, 0.0)
        return cls(len(balances), samples, num_samples - samples, fmean(fills), fmean(balances))

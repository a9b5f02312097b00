"""What a benchmark found."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

AGREEMENT = 0.99
"""Least cosine between a token and the packed encoder's on that image alone, above which a contestant is right."""


@dataclass(frozen=True)
class Row:
    """One contestant on one workload.

    Attributes:
        workload: the workload whose table it stands in.
        name: the contestant.
        capacity: tokens per pack, `None` where there are no packs.
        images, tokens: what one run takes in; tokens without prefix tokens.
        calls: forwards in one run.
        flops: of one run, by `nopad.bench.measure.flops`.
        not_run: why it was not run, else `None`; then all that follows is empty.
        seconds: each timed run.
        peak_bytes: the contestant's weights and the most that it allocated on top, outputs of a call included, inputs
            not; `None` where the device does not tell.
        min_cosine: least cosine of a token of the images that were checked; NaN where they cannot be compared.
    """

    workload: str
    name: str
    capacity: int | None
    images: int
    tokens: int
    calls: int
    flops: int
    not_run: str | None = None
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    min_cosine: float | None = None

    @property
    def label(self) -> str:
        """Name and capacity."""
        return self.name if self.capacity is None else f"{self.name}, packs of {self.capacity:,}"

    @property
    def median(self) -> float | None:
        """Seconds of the run in the middle."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Of the run in the middle."""
        return None if self.median is None else self.images / self.median

    @property
    def tokens_per_second(self) -> float | None:
        """Of the run in the middle."""
        return None if self.median is None else self.tokens / self.median

    @property
    def teraflops(self) -> float | None:
        """TFLOP/s of the run in the middle."""
        return None if self.median is None else self.flops / self.median / 1e12

    @property
    def agrees(self) -> bool | None:
        """Whether its features are the packed encoder's; `None` where it was not run."""
        return None if self.min_cosine is None else self.min_cosine > AGREEMENT


@dataclass(frozen=True)
class Ceiling:
    """What a plain matrix product reaches on random data.

    Attributes:
        side: rows and columns of both matrices.
        before, after: TFLOP/s before the first contestant and after the last.
    """

    side: int
    before: float
    after: float

    @property
    def teraflops(self) -> float:
        """The mean of both, that shares are of."""
        return (self.before + self.after) / 2


@dataclass(frozen=True)
class Facts:
    """A workload in numbers.

    Attributes:
        name: for tables.
        images: how many.
        sizes: how many of them differ.
        tokens: patches of all images together.
        longest: patches of the largest image.
    """

    name: str
    images: int
    sizes: int
    tokens: int
    longest: int

    def describe(self) -> str:
        """One line."""
        sizes = "one size" if self.sizes == 1 else f"{self.sizes:,} sizes"
        return f"{self.images:,} images of {sizes}, {self.tokens:,} patches, at most {self.longest:,} each"


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found, and what it rests on.

    Attributes:
        original: the peers' model, or why there is none.
        versions: of the software.
        parameters: of the transformer blocks.
        seed: of images and weights that are random.
        runs: timed runs of each contestant.
    """

    checkpoint: str
    family: str
    original: str
    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    parameters: int
    seed: int
    runs: int
    ceiling: Ceiling
    workloads: tuple[Facts, ...]
    rows: tuple[Row, ...]

    def share(self, row: Row) -> float | None:
        """The row's TFLOP/s over the ceiling's."""
        return None if row.teraflops is None else row.teraflops / self.ceiling.teraflops

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: also what follows from the measurements; NaN, which JSON does not have, is `None`."""
        rows = [
            {
                **asdict(row),
                "min_cosine": None if row.min_cosine is None or math.isnan(row.min_cosine) else row.min_cosine,
                "median_seconds": row.median,
                "images_per_second": row.images_per_second,
                "tokens_per_second": row.tokens_per_second,
                "teraflops": row.teraflops,
                "share_of_ceiling": self.share(row),
                "agrees": row.agrees,
            }
            for row in self.rows
        ]
        return {**asdict(self), "ceiling": {**asdict(self.ceiling), "teraflops": self.ceiling.teraflops}, "rows": rows}

"""What a benchmark found."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

AGREEMENT = 0.99
"""Least cosine between a token and the packed encoder's on that image alone, above which a contestant is right."""


def counted(number: int, noun: str) -> str:
    """`"1 run"`, `"2 runs"`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Row:
    """One contestant on one workload.

    Attributes:
        workload: the workload whose table it stands in.
        name: the contestant.
        capacity: tokens per pack, `None` where there are no packs.
        images, tokens: what one run takes in; tokens without prefix tokens.
        calls: forwards in one run.
        flops: of one run, by `nopad.bench.timing.flops`.
        not_run: why it was not run, else `None`; then all that follows is empty.
        seconds: each timed run.
        ceilings: the seconds of the ceiling around each of them, the mean of its runs right before and right after.
        peak_bytes: the contestant's weights and the most that it allocated on top, packs or batches of the images
            included, the images' own pixels not; `None` where the device does not tell.
        min_cosine: least cosine of a token of the images that were checked; NaN where they cannot be compared.
        layers: how those of a compiled packed encoder were made ready: "fused by …", "compiled", or "eager" where
            neither could be; `None` of others.
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
    ceilings: tuple[float, ...] = ()
    peak_bytes: int | None = None
    min_cosine: float | None = None
    layers: str | None = None

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
    """What a plain matrix product reaches on random data, before and after each run of a workload's contestants.

    Attributes:
        side: rows and columns of both matrices.
        products: in one run.
        seconds: each timed run.
    """

    side: int
    products: int
    seconds: tuple[float, ...]

    @property
    def teraflops(self) -> float:
        """TFLOP/s of the run in the middle."""
        return self.teraflops_in(statistics.median(self.seconds))

    @property
    def least_teraflops(self) -> float:
        """TFLOP/s of the slowest run."""
        return self.teraflops_in(max(self.seconds))

    @property
    def most_teraflops(self) -> float:
        """TFLOP/s of the fastest run."""
        return self.teraflops_in(min(self.seconds))

    def describe(self) -> str:
        """What it is, what was found, and how, in one line."""
        found = f"{self.teraflops:.4g} TFLOP/s ({self.least_teraflops:.4g} … {self.most_teraflops:.4g})"
        how = f"median of {counted(len(self.seconds), 'run')}, around those of contestants"
        return f"matrix products of {self.side:,}³, {self.products} a run: {found}, {how}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: also what follows from the measurements."""
        names = "teraflops", "least_teraflops", "most_teraflops"
        return {**asdict(self), **{name: getattr(self, name) for name in names}, "about": self.describe()}

    def teraflops_in(self, seconds: float) -> float:
        """TFLOP/s of a run that took so long."""
        return 2 * self.side**3 * self.products / seconds / 1e12


@dataclass(frozen=True)
class Facts:
    """A workload in numbers, and its ceiling.

    Attributes:
        name: for tables.
        images: how many.
        sizes: how many of them differ.
        tokens: patches of all images together.
        longest: patches of the largest image.
        ceiling: measured before and after each run of this workload's contestants.
    """

    name: str
    images: int
    sizes: int
    tokens: int
    longest: int
    ceiling: Ceiling

    def describe(self) -> str:
        """Its images in one line."""
        sizes = "one size" if self.sizes == 1 else f"{self.sizes:,} sizes"
        return f"{counted(self.images, 'image')} of {sizes}, {self.tokens:,} patches, at most {self.longest:,} each"


@dataclass(frozen=True)
class BenchReport:
    """What a benchmark found, and what it rests on.

    Attributes:
        original: the peers' model, `None` where none runs.
        no_original: why none does, else `None`.
        versions: of the software.
        parameters: of the transformer blocks.
        seed: of images and weights that are random.
        runs: timed runs of each contestant.
    """

    checkpoint: str
    family: str
    original: str | None
    no_original: str | None
    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    parameters: int
    seed: int
    runs: int
    workloads: tuple[Facts, ...]
    rows: tuple[Row, ...]

    def share(self, row: Row) -> float | None:
        """A run's TFLOP/s over those of the ceiling around it, of the run in the middle.

        A GPU's clock follows what it did in the second before: after contestants that leave it idle the same products
        take a tenth less time than after others.
        """
        ceiling = {facts.name: facts.ceiling for facts in self.workloads}[row.workload]
        shares = [
            row.flops / seconds / 1e12 / ceiling.teraflops_in(around)
            for seconds, around in zip(row.seconds, row.ceilings, strict=True)
        ]
        return statistics.median(shares) if shares else None

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
        workloads = [{**asdict(facts), "ceiling": facts.ceiling.to_dict()} for facts in self.workloads]
        return {**asdict(self), "workloads": workloads, "rows": rows}

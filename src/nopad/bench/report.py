"""Results of a benchmark."""

from __future__ import annotations

import statistics
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from nopad.bench.workloads import describe_images
from nopad.counts import counted

MIN_COSINE = 0.99
"""A candidate's features are right where every cosine to the packed encoder's on that image alone is above this."""


@dataclass(frozen=True)
class Row:
    """Result of one candidate on one workload.

    Attributes:
        workload: the workload in whose table it stands.
        name: of the candidate.
        capacity: tokens per pack, `None` where there are no packs.
        images, tokens: inputs of one run; tokens without prefix tokens.
        calls: forwards in one run.
        flops: floating-point operations of one run, by `nopad.bench.timing.flops`.
        skipped: the reason why it did not run, else `None`; where there is one, all that follows is empty.
        seconds: each timed run.
        peak_seconds: for each of them, the mean of the peak's runs right before and right after it.
        peak_memory_bytes: the weights and the most allocated on top, packs or batches of the images included, the
            images' own pixels not; `None` if unavailable.
        min_cosine: lowest cosine of a token of the images that were checked; NaN where they cannot be compared.
        execution: how the layers of a compiled packed encoder ran, see `PackedEncoder.execution`; `None` of others.
    """

    workload: str
    name: str
    capacity: int | None
    images: int
    tokens: int
    calls: int
    flops: int
    skipped: str | None = None
    seconds: tuple[float, ...] = ()
    peak_seconds: tuple[float, ...] = ()
    peak_memory_bytes: int | None = None
    min_cosine: float | None = None
    execution: str | None = None

    @property
    def label(self) -> str:
        """Name and capacity."""
        return self.name if self.capacity is None else f"{self.name}, packs of {self.capacity:,}"

    @property
    def median(self) -> float | None:
        """Seconds of the median run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Images per second of the median run."""
        return None if self.median is None else self.images / self.median

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of the median run."""
        return None if self.median is None else self.tokens / self.median

    @property
    def teraflops(self) -> float | None:
        """TFLOP/s of the median run."""
        return None if self.median is None else self.flops / self.median / 1e12

    def skip(self, reason: str) -> Row:
        """The row of a candidate that did not run."""
        unmeasured: dict[str, Any] = {
            field.name: field.default for field in fields(self) if field.default is not MISSING
        }
        return replace(self, **{**unmeasured, "skipped": reason})

    def share(self, peak_flops: int) -> float | None:
        """Median over its runs of their operations a second over those of the peak right before and after them.

        A GPU's clock depends on its load in the second before: after candidates that leave it idle the same GEMMs take
        a tenth less time than after others.

        Args:
            peak_flops: operations of a run of the peak.
        """
        runs = zip(self.seconds, self.peak_seconds, strict=True)
        shares = [self.flops / seconds / (peak_flops / around) for seconds, around in runs]
        return statistics.median(shares) if shares else None

    @property
    def agrees(self) -> bool | None:
        """Whether its features are the packed encoder's; `None` where it was skipped."""
        return None if self.min_cosine is None else self.min_cosine > MIN_COSINE


@dataclass(frozen=True)
class MeasuredPeak:
    """Throughput of plain GEMMs on random data, run before and after each run of a workload's candidates.

    Attributes:
        side: rows and columns of both matrices.
        gemms: number of GEMMs in one run.
        seconds: each timed run.
    """

    side: int
    gemms: int
    seconds: tuple[float, ...]

    @property
    def teraflops(self) -> float:
        """TFLOP/s of the median run."""
        return self.teraflops_in(statistics.median(self.seconds))

    @property
    def min_teraflops(self) -> float:
        """TFLOP/s of the slowest run."""
        return self.teraflops_in(max(self.seconds))

    @property
    def max_teraflops(self) -> float:
        """TFLOP/s of the fastest run."""
        return self.teraflops_in(min(self.seconds))

    def describe(self) -> str:
        """One line: the GEMMs, the result, and how it was measured."""
        result = f"{self.teraflops:.4g} TFLOP/s ({self.min_teraflops:.4g} … {self.max_teraflops:.4g})"
        how = f"median of {counted(len(self.seconds), 'run')}, around those of the candidates"
        return f"{counted(self.gemms, 'GEMM')} of {self.side:,}³ a run: {result}, {how}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`, with what follows from the measurements."""
        names = "teraflops", "min_teraflops", "max_teraflops"
        return {**asdict(self), **{name: getattr(self, name) for name in names}, "description": self.describe()}

    def teraflops_in(self, seconds: float) -> float:
        """TFLOP/s of a run that took so long."""
        return self.flops / seconds / 1e12

    @property
    def flops(self) -> int:
        """Operations of a run."""
        return 2 * self.side**3 * self.gemms

    def share(self, row: Row) -> float | None:
        """A candidate's share of it, see `Row.share`."""
        return row.share(self.flops)


@dataclass(frozen=True)
class WorkloadStats:
    """A workload in numbers, and the peak measured beside it.

    Attributes:
        name: name in tables.
        images: number of images.
        sizes: number of different sizes among them.
        tokens: patches of all images together.
        longest: patches of the largest image.
        measured_peak: around the runs of this workload's candidates.
    """

    name: str
    images: int
    sizes: int
    tokens: int
    longest: int
    measured_peak: MeasuredPeak

    def describe(self) -> str:
        """Its images in one line."""
        return describe_images(self.images, self.sizes, self.tokens, self.longest)


@dataclass(frozen=True)
class BenchReport:
    """Results of a benchmark and the conditions under which they were measured.

    Attributes:
        reference: the baselines' model, `None` where there is none.
        no_reference: the reason why there is none, else `None`.
        versions: of the software.
        parameters: number of parameters of the transformer blocks.
        seed: seed of random images and weights.
        runs: timed runs of each candidate.
    """

    checkpoint: str
    family: str
    reference: str | None
    no_reference: str | None
    device: str
    dtype: str
    attention: str
    versions: dict[str, str]
    parameters: int
    seed: int
    runs: int
    workloads: tuple[WorkloadStats, ...]
    rows: tuple[Row, ...]

    def share(self, row: Row) -> float | None:
        """A candidate's share of the peak of its workload, see `Row.share`."""
        return {stats.name: stats.measured_peak for stats in self.workloads}[row.workload].share(row)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`, with what follows from the measurements."""
        rows = [
            {
                **asdict(row),
                "median_seconds": row.median,
                "images_per_second": row.images_per_second,
                "tokens_per_second": row.tokens_per_second,
                "teraflops": row.teraflops,
                "share_of_peak": self.share(row),
                "agrees": row.agrees,
            }
            for row in self.rows
        ]
        workloads = [{**asdict(stats), "measured_peak": stats.measured_peak.to_dict()} for stats in self.workloads]
        return {**asdict(self), "workloads": workloads, "rows": rows}

"""Results of the suite."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.bench.load_time import LoadTime
    from nopad.bench.report import Row

REFERENCE = "transformers"


@dataclass(frozen=True)
class SuiteWorkload:
    """One workload of one model.

    Attributes:
        checkpoint: the checkpoint as it was loaded.
        name, description: of the images.
        rows: one for each candidate and format.
        peak_flops: operations of a run of plain GEMMs, see `Row.peak_seconds`.
    """

    checkpoint: str
    name: str
    description: str
    rows: tuple[Row, ...]
    peak_flops: int

    def times(self, row: Row, format: str) -> float | None:
        """How many times as fast as the reference in `format` a candidate is: the median over the rounds of runs.

        `None` where either did not run.
        """
        reference = next((other for other in self.rows if other.name == f"{REFERENCE}, {format}"), None)
        if reference is None or not reference.seconds or not row.seconds:
            return None
        return statistics.median(r / s for r, s in zip(reference.seconds, row.seconds, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`, with what follows from the measurements."""
        rows = [{**asdict(row), **self._derived(row)} for row in self.rows]
        return {"checkpoint": self.checkpoint, "name": self.name, "description": self.description, "rows": rows}

    def _derived(self, row: Row) -> dict[str, Any]:
        return {
            "median_seconds": row.median,
            "agrees": row.agrees,
            "share_of_peak": row.share(self.peak_flops),
            "times_reference": self.times(row, format_of(row)),
            "times_reference_float32": self.times(row, "float32"),
        }


@dataclass(frozen=True)
class SuiteReport:
    """Results of the suite and the conditions under which they were measured."""

    device: str
    versions: dict[str, str]
    seed: int
    workloads: tuple[SuiteWorkload, ...]
    load_time: LoadTime

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "device": self.device,
            "versions": self.versions,
            "seed": self.seed,
            "workloads": [workload.to_dict() for workload in self.workloads],
            "load_time": self.load_time.to_dict(),
        }


def format_of(row: Row) -> str:
    """The format behind a row's name."""
    return row.name.rpartition(", ")[2]

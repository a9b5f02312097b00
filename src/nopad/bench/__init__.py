"""Benchmarks: the packed encoder beside the reference model, same weights, same images, same run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopad.lazy import lazy_names

if TYPE_CHECKING:
    from nopad.bench.report import BenchReport, Row
    from nopad.bench.run import bench

__all__ = ["BenchReport", "Row", "bench"]

# Imported when first used: the command line reads this package's options, which need no torch.
__getattr__ = lazy_names(
    __name__, {"BenchReport": "nopad.bench.report", "Row": "nopad.bench.report", "bench": "nopad.bench.run"}
)

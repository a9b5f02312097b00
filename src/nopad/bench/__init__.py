"""Benchmarks: the packed encoder beside the reference model, same weights, same images, same run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.bench.report import BenchReport, Row
    from nopad.bench.run import bench

__all__ = ["BenchReport", "Row", "bench"]

# Imported when first used: the command line reads this package's options, which need no torch.
_HOMES = {"BenchReport": "nopad.bench.report", "Row": "nopad.bench.report", "bench": "nopad.bench.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nopad.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

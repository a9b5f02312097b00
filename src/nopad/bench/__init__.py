"""Benchmarks: the packed encoder against the original model, same weights, same images, same run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.bench.report import BenchReport, Row
    from nopad.bench.runs import bench

__all__ = ["BenchReport", "Row", "bench"]

# Imported when first used: the command line asks this package for its options, which need no torch.
_HOMES = {"BenchReport": "nopad.bench.report", "Row": "nopad.bench.report", "bench": "nopad.bench.runs"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nopad.bench' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

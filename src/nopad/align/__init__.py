"""Alignment: the packed encoder compared with the reference model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.align.report import AlignReport
    from nopad.align.run import align

__all__ = ["AlignReport", "align"]

# Imported when first used: the command line reads this package's options, which need no torch.
_HOMES = {"AlignReport": "nopad.align.report", "align": "nopad.align.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nopad.align' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""Alignment: the packed encoder compared with the reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nopad.lazy import lazy_names

if TYPE_CHECKING:
    from nopad.align.report import AlignReport
    from nopad.align.run import align

__all__ = ["AlignReport", "align"]

# Imported when first used: the command line reads this package's options, which need no torch.
__getattr__ = lazy_names(__name__, {"AlignReport": "nopad.align.report", "align": "nopad.align.run"})

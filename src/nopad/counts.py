"""Counts that callers and files give: integers, and neither floats nor booleans that look like them."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`: Python's or numpy's, no `True`, no `2.0`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise `ValueError` unless a value is such an integer."""
    if not is_count(value, least):
        kind = "" if isinstance(value, Integral) and not isinstance(value, bool) else "an integer "
        raise ValueError(f"{name}: expected {kind}≥ {least}, got {value!r:.80}")

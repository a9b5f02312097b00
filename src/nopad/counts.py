"""Counts: checks, integers are neither booleans nor floats that look like them; and counts in words."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_count(value: Any, minimum: int = 1) -> bool:
    """Whether a value is an integer ≥ `minimum`: Python's or numpy's, no `True`, no `2.0`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def check_count(name: str, value: Any, minimum: int = 1) -> None:
    """Raise `ValueError` unless `is_count(value, minimum)`."""
    if not is_count(value, minimum):
        kind = "" if isinstance(value, Integral) and not isinstance(value, bool) else "an integer "
        raise ValueError(f"{name}: expected {kind}≥ {minimum}, got {value!r:.80}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite integer or float, no `True`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return isinstance(value, Integral) or math.isfinite(value)  # an integer may be too large for a float


def counted(number: int, noun: str) -> str:
    """`"1 run"`, `"2 runs"`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith(('ch', 'ss')) else 's'}"


def are(number: int) -> str:
    """The verb behind `counted`."""
    return "is" if number == 1 else "are"

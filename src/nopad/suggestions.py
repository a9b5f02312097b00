"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"`, for the end of a message; empty without a similar name."""
    lower = {each.lower(): each for each in names}
    typed = name.lower()[:200]
    close = [lower[match] for match in lower if typed and match.startswith(typed)][:3]
    close = close or [lower[match] for match in get_close_matches(typed, lower, n=3, cutoff=0.7)]
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""

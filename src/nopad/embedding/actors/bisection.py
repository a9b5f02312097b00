"""The search for the image that ends the process that embeds it."""

from __future__ import annotations

from collections.abc import Generator, Sequence

NUM_CONFIRMATIONS = 2
"""Processes that must die over an image alone: one may have been killed from outside."""


def find_fatal(rows: Sequence[int]) -> Generator[Sequence[int], bool, int | None]:
    """The first of `rows` that ends a process, `None` where each alone does not.

    Yields rows to embed in one go, and is sent whether the process survived. All of `rows` together did not.
    """
    while len(rows) > 1:
        half = rows[: len(rows) // 2]
        rows = rows[len(half) :] if (yield half) else half
    for _ in range(NUM_CONFIRMATIONS):
        if (yield rows):
            return None
    return rows[0]

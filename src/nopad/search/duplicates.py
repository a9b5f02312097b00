"""Groups of rows that are nearly the same image."""

from __future__ import annotations

import math

import numpy as np
import torch

from nopad.search.exact import similar_pairs


def check_threshold(threshold: float) -> None:
    """Raise `ValueError` unless it is a cosine above 0."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a cosine above 0, at most 1, got {threshold!r}")
    assert math.isfinite(threshold)


def duplicate_groups(embeddings: np.ndarray, threshold: float, device: torch.device) -> list[np.ndarray]:
    """Connected groups: in each, every row has one whose cosine to it is at least `threshold`.

    Each pair of rows is compared, in blocks; what is kept is one number for each row.

    Returns:
        The rows of each group of two or more, both in ascending order.
    """
    parents = np.arange(len(embeddings))
    for a, b in similar_pairs(embeddings, threshold, device):
        _connect(parents, a, b)
    roots = _roots(parents, np.arange(len(parents)))
    order = np.argsort(roots, kind="stable")
    starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
    return [group for group in np.split(order, starts[1:]) if len(group) > 1]


def _connect(parents: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Put the pairs `(a, b)` into one tree each; the root of a tree is its lowest row."""
    while True:
        a, b = _roots(parents, a), _roots(parents, b)
        differ = a != b
        if not differ.any():
            return
        a, b = a[differ], b[differ]
        np.minimum.at(parents, np.maximum(a, b), np.minimum(a, b))


def _roots(parents: np.ndarray, rows: np.ndarray) -> np.ndarray:
    start = rows
    while not np.array_equal(up := parents[rows], rows):
        rows = up
    parents[start] = rows
    return rows

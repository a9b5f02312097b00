"""Exact cosine search in blocks: memory is that of a block, however many rows a table has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 256 << 20
PAIR_ROWS = 2048
ROUNDING = 1e-6
"""Cosines of equal vectors differ from 1 by this much, at most."""
_NO_LENGTH = 1e-12
"""Smallest norm that is divided by, as in `torch.nn.functional.normalize`."""


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit(rows: np.ndarray, device: torch.device) -> Tensor:
    """Rows `(n, D)` of length one, float32, on a device; rows of zeros stay zeros."""
    return torch.nn.functional.normalize(_on(device, rows), dim=1)


def _on(device: torch.device, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)


def blocks(embeddings: np.ndarray, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """`(start, rows)`, one block after the other."""
    rows = rows or max(1, BLOCK_BYTES // (4 * embeddings.shape[1]))
    for start in range(0, len(embeddings), rows):
        yield start, embeddings[start : start + rows]


def top_k(
    embeddings: np.ndarray, queries: np.ndarray, k: int, device: torch.device, lengths: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` rows of the highest cosine for each query; of equal ones the first.

    Args:
        embeddings: `(N, D)`.
        queries: `(Q, D)`.
        k: number of rows, at least 1.
        lengths: norms of the rows `(N,)`, kept for the next call; those that are NaN are computed and stored there.

    Returns:
        Cosines and rows, both `(Q, min(k, N))`, best first.
    """
    unit_queries = unit(queries, device)
    best = [(torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)) for _ in unit_queries]
    for start, block in blocks(embeddings):
        candidates = _on(device, block)
        block_lengths = None if lengths is None else lengths[start : start + len(block)]
        if block_lengths is None or np.isnan(block_lengths).any():
            of_block = candidates.norm(dim=1)
            if block_lengths is not None:
                block_lengths[:] = of_block.cpu().numpy()
        else:
            of_block = _on(device, block_lengths)
        # Products by lengths: rows of length one would be a copy of the table for each query.
        cosines = (unit_queries @ candidates.T).div_(of_block.clamp_min(_NO_LENGTH))
        lowest = cosines.topk(min(k, len(block)), dim=1).values[:, -1:] - 2 * ROUNDING
        for number, is_near in enumerate(cosines >= lowest):
            rows = is_near.nonzero().flatten()
            # Row by row: a GEMM rounds by the place of a row, so that equal rows would not be equal.
            exact = (torch.nn.functional.normalize(candidates[rows], dim=1) * unit_queries[number]).sum(dim=1)
            scores = torch.cat((best[number][0], exact))
            scores, order = scores.sort(descending=True, stable=True)
            best[number] = scores[:k], torch.cat((best[number][1], rows + start))[order[:k]]
    scores, rows = (torch.stack(parts) for parts in zip(*best, strict=True))
    return scores.cpu().numpy(), rows.cpu().numpy()


def similar_pairs(
    embeddings: np.ndarray, threshold: float, device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of rows whose cosine is at least `threshold`, some at a time.

    Yields:
        Rows `a < b` of at most `PAIR_ROWS²` pairs.
    """
    for start, block in blocks(embeddings, PAIR_ROWS):
        left = unit(block, device)
        for other in range(start, len(embeddings), PAIR_ROWS):
            right = left if other == start else unit(embeddings[other : other + PAIR_ROWS], device)
            near = left @ right.T >= threshold - ROUNDING
            a, b = (near.triu(1) if other == start else near).nonzero(as_tuple=True)
            if len(a):
                yield a.cpu().numpy() + start, b.cpu().numpy() + other

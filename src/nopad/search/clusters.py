"""Spherical k-means by faiss, and each row's cluster by exact comparison."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch

from nopad.extras import install
from nopad.search.exact import blocks, unit


def has_faiss() -> bool:
    """Whether faiss is installed."""
    return importlib.util.find_spec("faiss") is not None


def import_faiss() -> Any:
    """The library of indexes and k-means.

    Raises:
        ImportError: it is not installed.
    """
    if not has_faiss():
        raise ImportError(f"this needs faiss-cpu: {install('search')}", name="faiss")
    import faiss

    return faiss


def centroids(embeddings: np.ndarray, k: int, *, seed: int) -> np.ndarray:
    """`(k, D)` centres of length one, found on a sample of at most 256 rows for each.

    Raises:
        ImportError: no faiss.
    """
    faiss = import_faiss()
    rng = np.random.default_rng(seed)
    number = min(len(embeddings), 256 * k)
    sample = np.sort(rng.choice(len(embeddings), number, replace=False))
    points = unit(embeddings[sample], torch.device("cpu")).numpy()
    means = faiss.Kmeans(points.shape[1], k, spherical=True, seed=seed, niter=25, min_points_per_centroid=1)
    means.cp.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    means.train(points)
    return means.centroids


def assign(embeddings: np.ndarray, centres: np.ndarray, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """For each row the nearest of `(k, D)` centres and its cosine, both `(N,)`."""
    unit_centres = unit(centres, device)
    step = max(1, (64 << 20) // (4 * max(embeddings.shape[1], len(centres))))
    numbers = np.empty(len(embeddings), np.int64)
    cosines = np.empty(len(embeddings), np.float32)
    for start, block in blocks(embeddings, step):
        best = (unit(block, device) @ unit_centres.T).max(dim=1)
        numbers[start : start + len(block)] = best.indices.cpu().numpy()
        cosines[start : start + len(block)] = best.values.cpu().numpy()
    return numbers, cosines

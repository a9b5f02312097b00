"""Vectors on a plane, and in few directions."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nopad.search.exact import blocks, unit

MAX_WIDTH = 2048
"""Wider vectors are projected to this width at random first, which changes their cosines by about 0.02."""
_BLOCK_ROWS = 1 << 14
_UMAP_DIRECTIONS, _UMAP_NEIGHBOURS = 50, 15
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Projection:
    """Directions of vectors of length one.

    Attributes:
        rows: `(N, D)`, of any length; rows of zeros stay zeros.
        mean: `(D,)` of the normed rows, float64.
        moments: `(D, D)`, the sum of their outer products, float64.
    """

    rows: np.ndarray
    mean: Tensor
    moments: Tensor

    @classmethod
    def of(cls, rows: np.ndarray) -> Projection:
        """One pass over the rows."""
        if rows.shape[1] > MAX_WIDTH:
            rows = _narrowed(rows)
        width = rows.shape[1]
        total, moments = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for _, block in blocks(rows, _BLOCK_ROWS):
            block = unit(block, _CPU)
            total += block.sum(dim=0, dtype=torch.float64)
            moments += (block.T @ block).double()
        return cls(rows, total / max(1, len(rows)), moments)

    def principal_map(self) -> tuple[np.ndarray, float]:
        """`(N, 2)` float32 in the two directions in which rows differ most, and the share of the variance in these."""
        values, vectors = _eigen(self.moments - len(self.rows) * torch.outer(self.mean, self.mean))
        axes = torch.nn.functional.pad(vectors[:, :2], (0, 2 - vectors[:, :2].shape[1]))
        places = self._along(axes) - (self.mean @ axes).float().numpy()
        return places, float(values[:2].sum() / values.sum().clamp_min(1e-12))

    def strongest(self, number: int) -> np.ndarray:
        """`(N, number)` float32 in the directions in which rows are longest, which give about their cosines."""
        if number >= self.rows.shape[1]:
            return self._along(torch.eye(self.rows.shape[1]))
        return self._along(_eigen(self.moments)[1][:, :number])

    def umap(self) -> np.ndarray:
        """`(N, 2)` float32 by UMAP (arXiv:1802.03426), of the strongest directions.

        Raises:
            ImportError: umap-learn is not installed.
        """
        if not has_umap():
            raise ImportError("a map by UMAP needs umap-learn: pip install umap-learn", name="umap")
        umap: Any = importlib.import_module("umap")
        neighbours = min(_UMAP_NEIGHBOURS, len(self.rows) - 1)
        model = umap.UMAP(n_components=2, n_neighbors=neighbours, min_dist=0.1, metric="cosine", random_state=0)
        return np.asarray(model.fit_transform(self.strongest(_UMAP_DIRECTIONS)), np.float32)

    def _along(self, axes: Tensor) -> np.ndarray:
        out = np.empty((len(self.rows), axes.shape[1]), np.float32)
        for start, block in blocks(self.rows, _BLOCK_ROWS):
            out[start : start + len(block)] = (unit(block, _CPU) @ axes.float()).numpy()
        return out


def has_umap() -> bool:
    """Whether umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def in_8_bits(vectors: np.ndarray) -> np.ndarray:
    """Rows as int8, each scaled by its largest value: directions without lengths."""
    largest = np.abs(vectors).max(axis=1, initial=0, keepdims=True)
    return np.rint(vectors * (127 / np.where(largest > 0, largest, 1))).astype(np.int8)


def _narrowed(rows: np.ndarray) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(rows.shape[1], MAX_WIDTH, generator=generator) * MAX_WIDTH**-0.5
    out = np.empty((len(rows), MAX_WIDTH), np.float32)
    for start, block in blocks(rows, _BLOCK_ROWS):
        out[start : start + len(block)] = (unit(block, _CPU) @ axes).numpy()
    return out


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, the largest first; the sign of each is that of its largest part."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return values, vectors * torch.where(signs == 0, 1, signs)

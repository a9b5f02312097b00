"""Positions that are added to the tokens, for a whole pack at once, in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.packing import Layout


def sincos_axis(positions: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine, then cosine of each position along one axis.

    The formula is apple/ml-aim's `get_sincos_pos_embed` (`aim/v2/utils`), itself from Vaswani et al., arXiv:1706.03762.

    Args:
        positions: `(M,)`.
        dim: values per position, even.
        temperature: the base of the frequencies.

    Returns:
        `(M, dim)` float32.
    """
    exponents = torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim / 2)
    angles = positions.float()[:, None] * (1.0 / temperature**exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(layout: Layout, hidden_size: int) -> Tensor:
    """Sine-cosine positions of every patch: the column's half, then the row's.

    Returns:
        `(T, hidden_size)` float32.
    """
    _, rows, columns = layout.coordinates.unbind(1)
    # Sines of the few distinct rows and columns, then a gather: not one sine per token and channel.
    table = sincos_axis(torch.arange(layout.longest_side, device=layout.device), hidden_size // 2)
    return torch.cat((table[columns], table[rows]), dim=1)


def resample(table: Tensor, source: tuple[int, int], target: tuple[int, int], mode: str) -> Tensor:
    """Resize a learned position table to another grid, antialiased, in float32.

    Args:
        table: `(rows · columns, D)` on the `source` grid.
        source: `(rows, columns)` of the table.
        target: `(rows, columns)` wanted.
        mode: `"bicubic"` as timm's `resample_abs_pos_embed`, `"bilinear"` as SigLIP2's `resize_positional_embeddings`.

    Returns:
        `(rows · columns, D)` float32 on the `target` grid.
    """
    table = table.float()
    if source == target:
        return table
    image = table.T.reshape(1, -1, *source)
    return F.interpolate(image, size=target, mode=mode, align_corners=False, antialias=True)[0].flatten(1).T


def tables_of_grids(layout: Layout, table_of: Callable[[tuple[int, int]], Tensor]) -> Tensor:
    """Positions of every patch out of one table for each distinct grid.

    Args:
        layout: the pack, at least one image; every frame is a full grid.
        table_of: gives the `(rows · columns, D)` table of a `(rows, columns)` grid.

    Returns:
        `(T, D)`.
    """
    grids = list(dict.fromkeys((h, w) for _, h, w in layout.grid))
    starts, total = {}, 0
    for h, w in grids:
        starts[h, w] = total
        total += h * w
    facts = torch.tensor([(starts[h, w], h * w) for _, h, w in layout.grid], dtype=torch.int64)
    start, area = facts.reshape(-1, 2).to(layout.device, non_blocking=True)[layout.image_index].unbind(1)
    return torch.cat([table_of(grid) for grid in grids])[start + layout.index_in_image % area]

"""Positions that are added to the tokens, for a whole pack at once, in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.layout import Layout

logger = logging.getLogger(__name__)


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


def sincos_2d(layout: Layout, hidden_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine-cosine positions of every patch: the column's half, then the row's.

    Returns:
        `(T, hidden_size)`, computed in float32 and cast to `dtype`.
    """
    _, rows, columns = layout.coordinates.unbind(1)
    if layout.longest_side > layout.num_patches:  # patch positions far apart
        both = sincos_axis(columns, hidden_size // 2), sincos_axis(rows, hidden_size // 2)
        return torch.cat(both, dim=1).to(dtype)
    # Sines of the few distinct rows and columns, then a gather: not one sine per token and channel.
    table = sincos_axis(torch.arange(layout.longest_side, device=layout.device), hidden_size // 2)
    return table.to(dtype)[torch.stack((columns, rows), dim=1)].flatten(1)


def resample(
    table: Tensor, source: tuple[int, int], target: tuple[int, int], mode: str, *, antialias: bool = True
) -> Tensor:
    """Resize a learned position table to another grid, in float32.

    Args:
        table: `(rows · columns, D)` on the `source` grid.
        source: `(rows, columns)` of the table.
        target: `(rows, columns)` wanted.
        mode: `"bicubic"` as timm's `resample_abs_pos_embed`, `"bilinear"` as SigLIP2's `resize_positional_embeddings`.
        antialias: `False` as the `interpolate_pos_encoding` of transformers' models.

    Returns:
        `(rows · columns, D)` float32 on the `target` grid.
    """
    table = table.float()
    if source == target:
        return table
    image = table.T.reshape(1, -1, *source)
    return F.interpolate(image, size=target, mode=mode, align_corners=False, antialias=antialias)[0].flatten(1).T


def tables_of_grids(
    layout: Layout, table_of: Callable[[tuple[int, int]], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Positions of every patch out of one table for each distinct grid.

    Args:
        layout: the pack, at least one image; every frame is a full grid.
        table_of: gives the `(rows · columns, D)` table of a `(rows, columns)` grid, in float32.
        dtype: what the caller casts positions to; without gradients the tables are cast instead, which are smaller.

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
    tables = [table_of(grid) for grid in grids]
    if not torch.is_grad_enabled():  # with them, those of a table's rows would be added up in half precision
        # Rows one after another, which those of a resized image are not: put together, they are read once more.
        tables = [table.to(dtype, memory_format=torch.contiguous_format) for table in tables]
    return torch.cat(tables)[start + layout.index_in_image % area]


def learned_positions(
    layout: Layout,
    table: Tensor,
    trained_grid: tuple[int, int],
    *,
    mode: str,
    antialias: bool = True,
    strict: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions of every patch out of a table learned on one grid; other grids get it resampled, which is told once.

    Args:
        layout: the pack; every frame is a full grid, or `patch_positions` say where on the trained grid a patch lies.
        table: `(rows · columns, D)` on the trained grid.
        trained_grid: `(rows, columns)`.
        mode, antialias: as `resample` takes them.
        strict: refuse other grids.
        dtype: as `tables_of_grids` takes it.

    Returns:
        `(T, D)` float32, or `dtype`.

    Raises:
        ValueError: `strict` and another grid than the trained one, or a `patch_positions` outside it.
    """
    rows, columns = trained_grid
    if layout.patch_positions is not None:
        if layout.longest_side > min(rows, columns):
            raise ValueError(
                f"patch_positions: expected rows and columns on the trained {rows} × {columns} grid, "
                f"got one of {layout.longest_side - 1}"
            )
        _, row, column = layout.patch_positions.unbind(1)
        return table.float()[row * columns + column]
    others = [(h, w) for _, h, w in layout.grid if (h, w) != trained_grid]
    if others and strict:
        raise ValueError(
            f"grid_thw: positions='strict' and the positions were learned on {trained_grid}, got {others[0]}; "
            f"resize the image or load with positions='resample'"
        )
    if others:
        _log_resampling(trained_grid, mode)
    if not layout.grid:
        return table.float()[:0]
    return tables_of_grids(layout, lambda grid: resample(table, trained_grid, grid, mode, antialias=antialias), dtype)


@lru_cache
def _log_resampling(grid: tuple[int, int], mode: str) -> None:
    rows, columns = grid
    logger.warning(
        "positions were learned on %d × %d patches; other grids get them resampled (%s)", rows, columns, mode
    )

"""Additive position embeddings of a whole pack, computed in at least float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.layers.cached import cached_per_device
from nopad.layers.dtypes import at_least_float32
from nopad.layers.resampling import patch_weights, resample
from nopad.layout import Layout

logger = logging.getLogger(__name__)

TABLE_SIZE = 1024
"""Rows and columns whose sine-cosine positions are cached; packs with a longer side compute theirs per patch."""


def sincos_axis(positions: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Sine-cosine embedding of positions along one axis, sines before cosines.

    The formula is apple/ml-aim's `get_sincos_pos_embed` (`aim/v2/utils`), from Vaswani et al., arXiv:1706.03762.
    It is computed in float64, as there and in transformers: a float32 frequency, times a position of 4,096, is an angle
    that is off by 1.5e-4.

    Args:
        positions: `(M,)`.
        dim: values per position, even.
        temperature: base of the frequencies.

    Returns:
        `(M, dim)` float64, float32 on devices that have no float64.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    exponents = torch.arange(dim // 2, dtype=dtype, device=positions.device) / (dim / 2)
    angles = positions.to(dtype)[:, None] * (1.0 / temperature**exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def sincos_2d(layout: Layout, hidden_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sine-cosine positions of every patch: the half of the column, then that of the row.

    Returns:
        `(T, hidden_size)`, computed as `sincos_axis` does and rounded once, to `dtype`.
    """
    _, rows, columns = layout.coordinates.unbind(1)
    if layout.longest_side > TABLE_SIZE:
        halves = sincos_axis(columns, hidden_size // 2), sincos_axis(rows, hidden_size // 2)
        return torch.cat(halves, dim=1).to(dtype)
    return sincos_table(hidden_size // 2, dtype, layout.device)[torch.stack((columns, rows), dim=1)].flatten(1)


@cached_per_device
def sincos_table(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`sincos_axis` of the first `TABLE_SIZE` positions, rounded to `dtype`: `(TABLE_SIZE, dim)`."""
    return sincos_axis(torch.arange(TABLE_SIZE, device=device), dim).to(dtype)


def resampled_positions(
    layout: Layout,
    table: Tensor,
    source: tuple[int, int],
    mode: str,
    *,
    antialias: bool = True,
    align_corners: bool = False,
    channels_last: bool = True,
    crop: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions of every patch from one table, resampled to the grid of each image.

    Args:
        layout: the pack, at least one image; every frame is a full grid.
        table: `(rows · columns, D)` on the `source` grid.
        source: `(rows, columns)` of the table.
        mode, antialias, align_corners, channels_last, crop: as in `resample`.
        dtype: as in `tables_of_grids`.

    Returns:
        `(T, D)`.
    """
    if not torch.is_grad_enabled() and table.dtype != torch.float64 and has_triton(table.device):
        from nopad.kernels import triton_positions

        options = {"antialias": antialias, "align_corners": align_corners, "crop": crop}
        weights, spans, index = patch_weights(layout, source, mode, **options)
        return triton_positions.resample(table.float().contiguous(), weights, spans, index, source[1], dtype)
    options = {"antialias": antialias, "align_corners": align_corners, "channels_last": channels_last, "crop": crop}
    return tables_of_grids(layout, lambda grid: resample(table, source, grid, mode, **options), dtype)


def tables_of_grids(
    layout: Layout, table_of: Callable[[tuple[int, int]], Tensor], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Positions of every patch, gathered from one table for each distinct grid.

    Args:
        layout: the pack, at least one image; every frame is a full grid.
        table_of: returns the `(rows · columns, D)` table of a `(rows, columns)` grid, in float32 or float64.
        dtype: dtype that the caller casts positions to. Without gradients the tables are cast, which are smaller.

    Returns:
        `(T, D)`.
    """
    grids = list(dict.fromkeys((h, w) for _, h, w in layout.grid))
    starts, total = {}, 0
    for h, w in grids:
        starts[h, w] = total
        total += h * w
    starts_areas = torch.tensor([(starts[h, w], h * w) for _, h, w in layout.grid], dtype=torch.int64)
    start, area = starts_areas.reshape(-1, 2).to(layout.device, non_blocking=True)[layout.image_index].unbind(1)
    tables = [table_of(grid) for grid in grids]
    if not torch.is_grad_enabled():  # gradients of a table's rows would be accumulated in half precision
        # Contiguous, since rows are gathered below: resampled tables are transposed views.
        tables = [table.to(dtype, memory_format=torch.contiguous_format) for table in tables]
    return torch.cat(tables).to(layout.device)[start + layout.index_in_image % area]


def check_mode(mode: str) -> str:
    """A config's `positions_mode`, by which learned positions are resampled.

    Raises:
        ValueError: neither `'bicubic'` nor `'bilinear'`.
    """
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"positions_mode: expected 'bicubic' or 'bilinear', got {mode!r:.80}")
    return mode


def is_strict(positions: str) -> bool:
    """Whether a config's `positions` allows the trained grid only.

    Raises:
        ValueError: neither `'resample'` nor `'strict'`.
    """
    if positions not in ("resample", "strict"):
        raise ValueError(f"positions: expected 'resample' or 'strict', got {positions!r}")
    return positions == "strict"


def learned_positions(
    layout: Layout,
    table: Tensor,
    trained_grid: tuple[int, int],
    *,
    mode: str,
    antialias: bool = True,
    align_corners: bool = False,
    strict: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions of every patch from a table learned on one grid; resampled for other grids, which is logged once.

    Args:
        layout: the pack; every frame is a full grid, or `patch_positions` are positions on the trained grid.
        table: `(rows · columns, D)` on the trained grid.
        trained_grid: `(rows, columns)`.
        mode, antialias, align_corners: as in `resample`.
        strict: raise on other grids.
        dtype: as in `tables_of_grids`.

    Returns:
        `(T, D)` float32 or float64, or `dtype`.

    Raises:
        ValueError: `strict` and another grid than the trained one, or `patch_positions` outside it.
    """
    rows, columns = trained_grid
    if layout.patch_positions is not None:
        layout.check_on_grid(rows, columns)
        _, row, column = layout.patch_positions.unbind(1)
        return at_least_float32(table)[row * columns + column]
    other_grids = [(h, w) for _, h, w in layout.grid if (h, w) != trained_grid]
    if other_grids and strict:
        raise ValueError(
            f"grid_thw: positions='strict' and the positions were learned on {trained_grid}, got {other_grids[0]}; "
            f"resize the image or load with positions='resample'"
        )
    if other_grids:
        _log_resampling(trained_grid, mode)
    if not layout.grid:
        return at_least_float32(table)[:0]
    options: dict[str, Any] = {"antialias": antialias, "align_corners": align_corners, "dtype": dtype}
    return resampled_positions(layout, table, trained_grid, mode, **options)


@lru_cache
def _log_resampling(grid: tuple[int, int], mode: str) -> None:
    rows, columns = grid
    logger.warning(
        "positions were learned on %d × %d patches; they are resampled (%s) for other grids", rows, columns, mode
    )

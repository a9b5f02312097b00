"""Additive position embeddings of a whole pack, computed in at least float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.layers.cached import cached_per_device
from nopad.layers.dtypes import at_least_float32
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


def resample(
    table: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    mode: str,
    *,
    antialias: bool = True,
    align_corners: bool = False,
    channels_last: bool = True,
) -> Tensor:
    """Resize a learned position table to another grid.

    Args:
        table: `(rows · columns, D)` on the `source` grid.
        source: `(rows, columns)` of the table.
        target: `(rows, columns)` of the result.
        mode: `"bicubic"` as in timm's `resample_abs_pos_embed`, `"bilinear"` as in SigLIP2's
            `resize_positional_embeddings`.
        antialias: `False` as in `interpolate_pos_encoding` of transformers' models.
        align_corners: the first and the last row and column of both grids coincide, as in Qwen3-VL's
            `get_vision_interpolation_indices_and_weights`; without `antialias`.
        channels_last: `False` as in transformers' SigLIP2. torch 2.13 antialiases to a grid of one column wrongly on a
            CPU unless the table is in this memory format, as that of the other originals is.

    Returns:
        `(rows · columns, D)` float32 on the `target` grid, or float64 like the table.
    """
    table = at_least_float32(table)
    if source == target:
        return table
    image = table.unflatten(0, (1, *source)).permute(0, 3, 1, 2)
    if not channels_last:
        image = image[0].unsqueeze(0)  # with the strides of the original
    return _interpolate(image, target, mode, antialias, align_corners)[0].flatten(1).T


def _interpolate(image: Tensor, size: tuple[int, int], mode: str, antialias: bool, align_corners: bool) -> Tensor:
    return F.interpolate(image, size=size, mode=mode, align_corners=align_corners, antialias=antialias)


@lru_cache(maxsize=4096)
def axis_weights(source: int, target: int, mode: str, antialias: bool, align_corners: bool = False) -> Tensor:
    """Interpolation weights of the source positions for each target position: `(target, source)` float32."""
    identity = torch.eye(source, dtype=torch.float32)[
        None, None
    ]  # torch 2.13's antialiasing is wrong for single columns on a CPU
    return _interpolate(identity, (target, source), mode, antialias, align_corners)[0, 0]


def patch_weights(
    layout: Layout, source: tuple[int, int], mode: str, *, antialias: bool = True, align_corners: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of a table's rows and columns in the resampled position of each patch.

    Args:
        layout: the pack; every frame is a full grid.
        source: `(rows, columns)` of the table.
        mode, antialias, align_corners: as in `resample`.

    Returns:
        weights: `(M, n)` float32 weights of the table's n rows or columns, for M target positions: those along the
            distinct heights and widths of all grids.
        spans: `(M, 2)` int32 range of the weights that are not zero, end exclusive.
        index: `(T, 2)` int64 target positions of each patch's row and column.
    """
    parts, starts, total = [], {}, 0
    for axis, sides in enumerate(zip(*((h, w) for _, h, w in layout.grid), strict=True)):
        for side in dict.fromkeys(sides):
            starts[axis, side] = total
            total += side
            weights = axis_weights(source[axis], side, mode, antialias, align_corners)
            parts.append(F.pad(weights, (0, max(source) - source[axis])))
    weights = torch.cat(parts)
    used = (weights != 0).int()
    spans = torch.stack((used.argmax(1), weights.shape[1] - used.flip(1).argmax(1)), dim=1).int()
    image_starts = torch.tensor([(starts[0, h], starts[1, w]) for _, h, w in layout.grid], dtype=torch.int64)
    weights, spans, image_starts = (
        tensor.to(layout.device, non_blocking=True) for tensor in (weights, spans, image_starts)
    )
    return weights, spans, image_starts[layout.image_index] + layout.coordinates[:, 1:]


def resampled_positions(
    layout: Layout,
    table: Tensor,
    source: tuple[int, int],
    mode: str,
    *,
    antialias: bool = True,
    align_corners: bool = False,
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions of every patch from one table, resampled to the grid of each image.

    Args:
        layout: the pack, at least one image; every frame is a full grid.
        table: `(rows · columns, D)` on the `source` grid.
        source: `(rows, columns)` of the table.
        mode, antialias, align_corners, channels_last: as in `resample`.
        dtype: as in `tables_of_grids`.

    Returns:
        `(T, D)`.
    """
    if not torch.is_grad_enabled() and table.dtype != torch.float64 and has_triton(table.device):
        from nopad.kernels import triton_positions

        weights, spans, index = patch_weights(layout, source, mode, antialias=antialias, align_corners=align_corners)
        return triton_positions.resample(table.float().contiguous(), weights, spans, index, source[1], dtype)
    options = {"antialias": antialias, "align_corners": align_corners, "channels_last": channels_last}
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
    return torch.cat(tables)[start + layout.index_in_image % area]


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

"""Learned position tables resampled to other grids, and the weights of one kernel that does so for a whole pack."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.layers.dtypes import at_least_float32
from nopad.layout import Layout


def resample(
    table: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    mode: str,
    *,
    antialias: bool = True,
    align_corners: bool = False,
    channels_last: bool = True,
    crop: bool = False,
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
        crop: resize to the square of the longer side and keep its first rows and columns, as C-RADIO's patch generator;
            bilinearly and without `antialias`.

    Returns:
        `(rows · columns, D)` float32 on the `target` grid, or float64 like the table.
    """
    table = at_least_float32(table)
    if source == target:
        return table
    if crop:
        assert (mode, antialias) == ("bilinear", False)
        return _cropped(table, source, target, align_corners)
    image = table.unflatten(0, (1, *source)).permute(0, 3, 1, 2)
    if not channels_last:
        image = image[0].unsqueeze(0)  # with the strides of the original
    return _interpolate(image, target, mode, antialias, align_corners)[0].flatten(1).T


def _cropped(table: Tensor, source: tuple[int, int], target: tuple[int, int], align_corners: bool) -> Tensor:
    """The first rows and columns of a square, of which no more is computed: it may be of thousands of patches."""
    image = table.unflatten(0, source)
    for axis in range(2):
        weights = _axis_weights(source[axis], max(target), "bilinear", False, align_corners)[: target[axis]]
        values, taps = weights.to(image).topk(min(2, source[axis]))
        values = values.unsqueeze(-1) if axis else values[..., None, None]
        parts = [image.index_select(axis, taps[:, i]) * values[:, i] for i in range(taps.shape[1])]
        image = sum(parts[1:], parts[0])
    return image.flatten(0, 1)


def _interpolate(image: Tensor, size: tuple[int, int], mode: str, antialias: bool, align_corners: bool) -> Tensor:
    return F.interpolate(image, size=size, mode=mode, align_corners=align_corners, antialias=antialias)


@lru_cache(maxsize=4096)
def axis_weights(source: int, target: int, mode: str, antialias: bool, align_corners: bool = False) -> Tensor:
    """Interpolation weights of the source positions for each target position: `(target, source)` float32."""
    return _axis_weights(source, target, mode, antialias, align_corners)


def _axis_weights(source: int, target: int, mode: str, antialias: bool, align_corners: bool) -> Tensor:
    """`axis_weights` without its cache, which torch's compiler does not take."""
    identity = torch.eye(source, dtype=torch.float32)[
        None, None
    ]  # torch 2.13's antialiasing is wrong for single columns on a CPU
    return _interpolate(identity, (target, source), mode, antialias, align_corners)[0, 0]


def patch_weights(
    layout: Layout,
    source: tuple[int, int],
    mode: str,
    *,
    antialias: bool = True,
    align_corners: bool = False,
    crop: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of a table's rows and columns in the resampled position of each patch.

    Args:
        layout: the pack; every frame is a full grid.
        source: `(rows, columns)` of the table.
        mode, antialias, align_corners, crop: as in `resample`.

    Returns:
        weights: `(M, n)` float32 weights of the table's n rows or columns, for M target positions: those along the
            distinct heights and widths of all grids.
        spans: `(M, 2)` int32 range of the weights that are not zero, end exclusive.
        index: `(T, 2)` int64 target positions of each patch's row and column.
    """
    places = []
    for _, h, w in layout.grid:
        rows, columns = (max(h, w),) * 2 if crop else (h, w)
        places.append([(0, h, rows), (1, w, columns)])
    parts, starts, total = [], {}, 0
    for axis, side, whole in dict.fromkeys(place for of_image in places for place in of_image):
        starts[axis, side, whole] = total
        total += side
        weights = axis_weights(source[axis], whole, mode, antialias, align_corners)[:side]
        parts.append(F.pad(weights, (0, max(source) - source[axis])))
    weights = torch.cat(parts)
    used = (weights != 0).int()
    spans = torch.stack((used.argmax(1), weights.shape[1] - used.flip(1).argmax(1)), dim=1).int()
    image_starts = torch.tensor([[starts[place] for place in of_image] for of_image in places], dtype=torch.int64)
    weights, spans, image_starts = (
        tensor.to(layout.device, non_blocking=True) for tensor in (weights, spans, image_starts)
    )
    return weights, spans, image_starts[layout.image_index] + layout.coordinates[:, 1:]

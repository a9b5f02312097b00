"""OneVision's rotary position embedding over time, rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from nopad.layers.attention import Rope
from nopad.layers.dtypes import at_least_float32
from nopad.layers.rope import angles_along_axes
from nopad.layout import Layout

SPLIT = (4, 6, 6)
"""Shares of half the head size for time, row and column."""


def check_head_dim(head_dim: int) -> None:
    """Raise `ValueError` unless half the head size divides into shares of 4:6:6."""
    divisor = 2 * sum(SPLIT)
    if head_dim % divisor:
        raise ValueError(f"head size: expected a multiple of {divisor} for 4:6:6 rotary positions, got {head_dim}")


def angles_3d(coordinates: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angle of each position and channel, by the formula of OneVision-Encoder's `VideoRotaryEmbeddingSplit466`.

    Args:
        coordinates: `(T, 3)` integers `[t, h, w]`.
        head_dim: K, a multiple of 32.
        theta: base of the frequencies.

    Returns:
        `(T, K / 2)` float32: a quarter of the channels for time, three eighths for the row, three eighths for the
        column.
    """
    sizes = tuple(share * (head_dim // 2 // sum(SPLIT)) for share in SPLIT)
    return angles_along_axes(coordinates, sizes, theta)


def rope_3d(layout: Layout, head_dim: int, theta: float) -> Rope:
    """Rotary embedding of the queries and keys of a pack.

    The checkpoints were trained with a quirk and depend on it: the K / 2 angles are concatenated with themselves, as
    for channel pairs `(i, i + K / 2)`, but the pairs are neighbours `(2i, 2i + 1)`. The two channels of a pair
    therefore have two different angles, the rotation does not keep lengths, and no fused rotary kernel computes it. The
    original is `torch.cat([freqs, freqs])` and `rotate_half` over even and odd channels in OneVision-Encoder's
    `modeling_onevision_encoder.py`.
    """
    angles = angles_3d(layout.coordinates, head_dim, theta).repeat(1, 2)[:, None]
    return Rope(apply_rotary_interleaved, angles.cos(), angles.sin())


def apply_rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`(x0, x1) → (x0 cos0 - x1 sin0, x1 cos1 + x0 sin1)` for each pair of neighbouring channels.

    Computed in at least float32.

    Args:
        x: `(T, H, K)` queries or keys.
        cos, sin: `(T, 1, K)` float32, one angle for each channel; see `rope_3d`.

    Returns:
        `(T, H, K)` in the dtype of `x`.
    """
    x32 = at_least_float32(x)
    even, odd = x32.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x32 * cos + rotated * sin).to(x.dtype)

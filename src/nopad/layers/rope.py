"""Rotary positions (Su et al., arXiv:2104.09864): queries and keys are turned by angles that tell where a patch is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nopad.layers.cached import constant
from nopad.layout import Layout


@constant
def rope_periods(head_dim: int, base: float, device: torch.device | str) -> Tensor:
    """How far apart two patches are, in half image sides, when an angle comes round again: `base ** (4i / K)`.

    Returns:
        `(K / 4,)` float32.
    """
    number = head_dim // 4
    return base ** (torch.arange(number, dtype=torch.float32, device=device) / number)


@constant
def stored_periods(periods: tuple[float, ...], device: torch.device) -> Tensor:
    """`(K / 4,)` float32, where a checkpoint brings its own."""
    return torch.tensor(periods, device=device)


def patch_centres(layout: Layout) -> Tensor:
    """`[h, w]` of each patch's centre, both sides of its image running from -1 to 1.

    Returns:
        `(T, 2)` float32.
    """
    sides = layout.grid_thw[layout.image_index, 1:]
    return 2.0 * ((layout.coordinates[:, 1:] + 0.5) / sides) - 1.0


def axial_angles(points: Tensor, periods: Tensor) -> Tensor:
    """The angles of all periods along the first axis, then along the second.

    Args:
        points: `(T, 2)` float32.
        periods: `(K / 4,)` float32.

    Returns:
        `(T, K / 2)` float32.
    """
    return (2 * math.pi * points[:, :, None] / periods).flatten(1)


def rotate_halves(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels `(i, i + K / 2)` by its angle, in float32.

    Args:
        tensor: `(T, H, K)`.
        cos, sin: `(T, 1, K / 2)` float32.

    Returns:
        `(T, H, K)` in the dtype of `tensor`.
    """
    first, second = tensor.chunk(2, dim=-1)  # times a float32 cosine, half precision becomes float32
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(tensor.dtype)

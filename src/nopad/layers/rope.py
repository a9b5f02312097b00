"""Rotary position embedding (Su et al., arXiv:2104.09864) over the rows and columns of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nopad.layers.cached import cached_per_device
from nopad.layout import Layout


@cached_per_device
def rope_periods(head_dim: int, base: float, device: torch.device | str) -> Tensor:
    """Period of each frequency, in half image sides: `base ** (4i / K)`.

    Returns:
        `(K / 4,)` float32.
    """
    num_periods = head_dim // 4
    return base ** (torch.arange(num_periods, dtype=torch.float32, device=device) / num_periods)


@cached_per_device
def stored_periods(periods: tuple[float, ...], device: torch.device) -> Tensor:
    """The periods that a checkpoint stores, as a `(K / 4,)` float32 tensor."""
    return torch.tensor(periods, dtype=torch.float32, device=device)


def patch_centres(layout: Layout) -> Tensor:
    """`[h, w]` of each patch's centre, in coordinates from -1 to 1 along both sides of its image.

    Returns:
        `(T, 2)` float32.
    """
    sides = layout.grid_thw[layout.image_index, 1:]
    return 2.0 * ((layout.coordinates[:, 1:].float() + 0.5) / sides) - 1.0


def axial_angles(points: Tensor, periods: Tensor) -> Tensor:
    """Angles for all periods along the first axis, then along the second.

    Args:
        points: `(T, 2)` float32.
        periods: `(K / 4,)` float32.

    Returns:
        `(T, K / 2)` float32.
    """
    return (2 * math.pi * points[:, :, None] / periods).flatten(1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels `(i, i + K / 2)` by its angle, in float32.

    Args:
        x: `(T, H, K)` queries or keys.
        cos, sin: `(T, 1, K / 2)` float32.

    Returns:
        `(T, H, K)` in the dtype of `x`.
    """
    x1, x2 = x.chunk(2, dim=-1)  # half precision times a float32 cosine is float32
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

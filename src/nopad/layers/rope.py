"""Rotary position embedding (Su et al., arXiv:2104.09864) over the rows and columns of an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nopad.layers.cached import cached_per_device
from nopad.layout import Layout


def check_two_axes(head_dim: int) -> None:
    """Raise `ValueError` unless two axes share the pairs of channels of a head equally."""
    if head_dim % 4:
        raise ValueError(f"head size: expected a multiple of 4 for rope over two axes, got {head_dim}")


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


def angles_along_axes(coordinates: Tensor, sizes: tuple[int, ...], theta: float) -> Tensor:
    """Angle of each position and channel: the coordinate along the channel's axis times the channel's frequency.

    Args:
        coordinates: `(T, A)` integers.
        sizes: number of channels that each of the A axes rotates, K / 2 in all.
        theta: base of the frequencies.

    Returns:
        `(T, K / 2)` float32, the channels of the first axis before those of the second.
    """
    axes = channel_axes(sizes, coordinates.device)
    return coordinates.float()[:, axes] * channel_frequencies(sizes, theta, coordinates.device)


@cached_per_device
def channel_axes(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Index of the axis that rotates each channel of half a head, `(K / 2,)` int64."""
    axes, counts = torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
    return axes.repeat_interleave(counts, output_size=sum(sizes))


@cached_per_device
def channel_frequencies(sizes: tuple[int, ...], theta: float, device: torch.device) -> Tensor:
    """Angle per step along its axis of each channel of half a head, `(K / 2,)` float32: `theta ** (-i / size)`.

    Bit-equal to the `inv_freq` of OneVision-Encoder and of Qwen3-VL, which the checkpoints were trained with: computed
    per axis, on the CPU, with a relative rounding error of up to 3e-7. At position 4,096 that is an error of up to 1e-3
    in the angle, so more accurate frequencies, or those of another device, would not give the original's features.
    """
    frequencies = [1.0 / theta ** (torch.arange(size, dtype=torch.float32, device="cpu") / size) for size in sizes]
    return torch.cat(frequencies).to(device)


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

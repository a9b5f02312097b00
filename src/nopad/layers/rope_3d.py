"""OneVision's positions over time, rows and columns, by which queries and keys are turned."""

from __future__ import annotations

import torch
from torch import Tensor

from nopad.layers.attention import Rotation
from nopad.layers.cached import constant
from nopad.layout import Layout

SPLIT = (4, 6, 6)
"""Shares of half the head size that time, row and column have."""


def check_head_dim(head_dim: int) -> None:
    """Raise `ValueError` unless half the head size falls into whole shares of 4:6:6."""
    parts = 2 * sum(SPLIT)
    if head_dim % parts:
        raise ValueError(f"head size: expected a multiple of {parts} for 4:6:6 rotary positions, got {head_dim}")


def angles_3d(coordinates: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angle of each position and channel, by the formula of OneVision-Encoder's `VideoRotaryEmbeddingSplit466`.

    Args:
        coordinates: `(T, 3)` integers `[t, h, w]`.
        head_dim: K, a multiple of 32.
        theta: the base of the frequencies.

    Returns:
        `(T, K / 2)` float32: a quarter of the channels for time, three eighths for the row, three eighths for the
        column.
    """
    axes = axes_of_channels(head_dim, coordinates.device)
    return coordinates.float()[:, axes] * rates_of_channels(head_dim, theta, coordinates.device)


@constant
def axes_of_channels(head_dim: int, device: torch.device) -> Tensor:
    """Which of `[t, h, w]` turns each channel of half a head, `(K / 2,)` int64."""
    shares = torch.tensor(SPLIT, device=device) * (head_dim // 2 // sum(SPLIT))
    return torch.arange(len(SPLIT), device=device).repeat_interleave(shares)


@constant
def rates_of_channels(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """By what angle one step along its axis turns each channel of half a head, `(K / 2,)` float32."""
    sizes = (share * (head_dim // 2 // sum(SPLIT)) for share in SPLIT)
    exponents = [torch.arange(size, dtype=torch.float32, device=device) / size for size in sizes]
    return 1.0 / theta ** torch.cat(exponents)


def rotate_3d(layout: Layout, head_dim: int, theta: float) -> Rotation:
    """What turns the queries and keys `(T, H, K)` of a pack by the positions of their patches.

    The checkpoints were trained with a quirk, and depend on it: the table of K / 2 angles is repeated once more behind
    itself, as for channels that are paired half a head apart, but channels are paired with their neighbours. Channels
    `2i` and `2i + 1` so turn by two different angles, lengths are not kept, and no fused rotary kernel does the same.
    It stands in OneVision-Encoder's `modeling_onevision_encoder.py`: `torch.cat([freqs, freqs])`, and `rotate_half`
    over even and odd channels.
    """
    angles = angles_3d(layout.coordinates, head_dim, theta).repeat(1, 2)[:, None]
    return Rotation(turn_neighbours, angles.cos(), angles.sin())


def turn_neighbours(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`(x0, x1) → (x0 cos0 - x1 sin0, x1 cos1 + x0 sin1)` for each pair of neighbouring channels, in float32.

    Args:
        states: `(T, H, K)`.
        cos, sin: `(T, 1, K)` float32.
    """
    states32 = states.float()
    even, odd = states32.unflatten(-1, (-1, 2)).unbind(-1)
    crossed = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (states32 * cos + crossed * sin).to(states.dtype)

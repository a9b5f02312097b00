"""The transformer block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nopad.layers.attention import PackedAttention, Rotation
from nopad.layers.roles import ByRole
from nopad.segments import Segments


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        return hidden_states * self.lambda1


class Block(ByRole, GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then feed-forward, each added to what came in.

    Args:
        norm1, attention, norm2, mlp: its parts.
        layer_scale: multiply what is added by a learned factor per channel first.
        names: see `ByRole`; the roles are those of the arguments, `layer_scale1` and `layer_scale2`.
    """

    def __init__(
        self,
        norm1: nn.Module,
        attention: PackedAttention,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        layer_scale: bool = False,
        names: Mapping[str, str],
    ):
        super().__init__()
        self.names = names
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp
        size = attention.proj.out_features
        self.layer_scale1 = LayerScale(size) if layer_scale else None
        self.layer_scale2 = LayerScale(size) if layer_scale else None

    def forward(self, hidden_states: Tensor, segments: Segments, rotate: Rotation | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        hidden_states, update = self.deferred(hidden_states, None, segments, rotate)
        return add(hidden_states, update)

    def deferred(
        self, hidden_states: Tensor, update: Tensor | None, segments: Segments, rotate: Rotation | None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, with residual sums left open: a compiler makes each in one pass with the norm after it.

        Args:
            hidden_states: `(T, D)`.
            update: `(T, D)` still to be added to them, `None` where there is nothing.
            segments, rotate: as `forward` takes them.

        Returns:
            Hidden states and the update that is still to be added to them.
        """
        if update is not None:
            hidden_states = add(hidden_states, update)
        mixed = self.attention(self.norm1(hidden_states), segments, rotate)
        hidden_states = add(hidden_states, mixed if self.layer_scale1 is None else self.layer_scale1(mixed))
        fed = self.mlp(self.norm2(hidden_states))
        return hidden_states, fed if self.layer_scale2 is None else self.layer_scale2(fed)


def add(hidden_states: Tensor, update: Tensor) -> Tensor:
    """The residual sum, the same bits compiled and not."""
    if torch.compiler.is_compiling():
        # Spelt out, because a compiler lets the product before accumulate on a copy of the residual, and copies it.
        return (hidden_states.float() + update.float()).to(hidden_states.dtype)
    return hidden_states + update

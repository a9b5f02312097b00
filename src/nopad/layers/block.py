"""The transformer block."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nopad.layers.attention import PackedAttention, Rotate
from nopad.packing import Segments


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then feed-forward, each added to what came in."""

    def __init__(self, norm1: nn.Module, attention: PackedAttention, norm2: nn.Module, mlp: nn.Module):
        super().__init__()
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, hidden_states: Tensor, segments: Segments, rotate: Rotate | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        hidden_states = hidden_states + self.attention(self.norm1(hidden_states), segments, rotate)
        return hidden_states + self.mlp(self.norm2(hidden_states))

"""Self-attention over a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nopad.layers.varlen import varlen_attention
from nopad.layout import Segments


@dataclasses.dataclass  # not frozen: torch's compiler cannot make one that is
class Rotation:
    """Turns queries or keys `(T, H, K)` by the positions of their tokens.

    Attributes:
        turn: called with states, cosines and sines.
        cos, sin: `(T, 1, …)` float32.
    """

    turn: Callable[[Tensor, Tensor, Tensor], Tensor]
    cos: Tensor
    sin: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """`(T, H, K)` to `(T, H, K)`."""
        return self.turn(states, self.cos, self.sin)

    def padded(self, rows: int) -> Rotation:
        """The same, for `rows` tokens of which the last are not turned."""
        more = (0, 0, 0, 0, 0, rows - self.cos.shape[0])
        return Rotation(self.turn, F.pad(self.cos, more, value=1.0), F.pad(self.sin, more))


class PackedAttention(nn.Module):
    """Multi-head self-attention in which each token sees its own segment; one matrix for queries, keys and values.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qkv_bias: bool, proj_bias: bool, dropout_p: float):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.dropout_p = dropout_p
        self.backend = "auto"
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=proj_bias)

    def forward(self, hidden_states: Tensor, segments: Segments, rotate: Rotation | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        qkv = self.qkv(hidden_states).view(-1, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(1)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        dropout_p = self.dropout_p if self.training else 0.0
        mixed = varlen_attention(query, key, value, segments, dropout_p=dropout_p, backend=self.backend)
        return self.proj(mixed.flatten(1))

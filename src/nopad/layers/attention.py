"""Self-attention over a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nopad.kernels.attention import varlen_attention
from nopad.layers.linear import SharedInput
from nopad.segments import Segments


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


class PackedAttention(SharedInput):
    """Multi-head self-attention in which each token sees its own segment.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D.
        qkv_bias: whether queries, keys and values have a bias, one answer for all or one for each.
        proj_bias: whether the projection has one.
        dropout_p: share of the attention weights that training drops.
        names: see `ByRole`; the roles are `q`, `k`, `v` and `proj`.

    Attributes:
        qkv: one map in place of `q`, `k` and `v`, in formats that are for inference alone; else `None`.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    siblings = ("q", "k", "v")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qkv_bias: bool | tuple[bool, bool, bool],
        proj_bias: bool,
        dropout_p: float,
        names: Mapping[str, str],
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        self.names = names
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.dropout_p = dropout_p
        self.backend = "auto"
        q_bias, k_bias, v_bias = (qkv_bias,) * 3 if isinstance(qkv_bias, bool) else qkv_bias
        self.q = nn.Linear(hidden_size, hidden_size, bias=q_bias)
        self.k = nn.Linear(hidden_size, hidden_size, bias=k_bias)
        self.v = nn.Linear(hidden_size, hidden_size, bias=v_bias)
        self.proj = nn.Linear(hidden_size, hidden_size, bias=proj_bias)
        self.qkv: nn.Module | None = None

    def forward(self, hidden_states: Tensor, segments: Segments, rotate: Rotation | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        query, key, value = self._project(hidden_states)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        dropout_p = self.dropout_p if self.training else 0.0
        mixed = varlen_attention(query, key, value, segments, dropout_p=dropout_p, backend=self.backend)
        return self.proj(mixed.flatten(1))

    def _project(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, `(T, H, K)` each."""
        qkv = self.multiply_at_once(hidden_states) if self.qkv is None else self.qkv(hidden_states)
        if qkv is not None:
            return qkv.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        return [linear(hidden_states).view(-1, self.num_heads, self.head_dim) for linear in (self.q, self.k, self.v)]

"""Self-attention over a pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.kernels.attention import varlen_attention
from nopad.layers.linear import StackedLinears
from nopad.segments import Segments


@dataclasses.dataclass  # not frozen: torch's compiler cannot make one that is
class Rope:
    """Rotary embedding: cosines, sines, and the function that applies them to queries or keys.

    Attributes:
        apply: `apply_rotary` or `apply_rotary_interleaved`; called with queries or keys `(T, H, K)`, `cos` and `sin`.
        cos, sin: `(T, 1, …)` float32.
    """

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`(T, H, K)` to `(T, H, K)`."""
        return self.apply(x, self.cos, self.sin)

    def to(self, device: torch.device | str | int) -> Rope:
        """The same on `device`, copied there once; accelerate calls it for layers elsewhere."""
        device = torch.device(device)
        if device == self.cos.device:
            return self
        copies = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            copies[device] = Rope(self.apply, self.cos.to(device), self.sin.to(device))
        return copies[device]

    def padded(self, num_tokens: int) -> Rope:
        """Extended to `num_tokens` tokens; those that are added are not rotated."""
        padding = (0, 0, 0, 0, 0, num_tokens - self.cos.shape[0])
        return Rope(self.apply, F.pad(self.cos, padding, value=1.0), F.pad(self.sin, padding))


class PackedAttention(StackedLinears):
    """Multi-head self-attention within the segments of a pack.

    Args:
        hidden_size: D.
        num_heads: H, a divisor of D.
        qkv_bias: whether queries, keys and values have a bias: one bool for all, or one for each.
        proj_bias: whether the output projection has a bias.
        dropout_p: dropout probability of the attention weights in training.
        one_qkv: whether queries, keys and values are one linear layer of the original, with one `qkv_bias`.
        windowed: whether tokens attend to their window alone, and not to their whole segment.
        names: see `RoleAliases`; the roles are `q`, `k`, `v` and `proj`, with `one_qkv` `qkv` and `proj`.

    Attributes:
        qkv: one linear layer in place of `q`, `k` and `v`, with `one_qkv` and in formats for inference only; else
            `None`.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    siblings = ("q", "k", "v")
    q: Any
    k: Any
    v: Any
    qkv: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        qkv_bias: bool | tuple[bool, bool, bool],
        proj_bias: bool,
        dropout_p: float,
        one_qkv: bool = False,
        windowed: bool = False,
        names: Mapping[str, str],
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: expected a divisor of hidden_size {hidden_size}, got {num_heads}")
        self.names = names
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.dropout_p = dropout_p
        self.windowed = windowed
        self.backend = "auto"
        biases = (qkv_bias,) * 3 if isinstance(qkv_bias, bool) else qkv_bias
        if one_qkv:
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=any(biases))
            self.q = self.k = self.v = None
        else:
            self.q, self.k, self.v = (nn.Linear(hidden_size, hidden_size, bias=bias) for bias in biases)
            self.qkv = None
        self.proj = nn.Linear(hidden_size, hidden_size, bias=proj_bias)

    @property
    def qkv_linears(self) -> tuple[Any, ...]:
        """The linear layers of queries, keys and values: three, or one for all."""
        return (self.q, self.k, self.v) if self.qkv is None else (self.qkv,)

    def forward(self, hidden_states: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        query, key, value = self._project(hidden_states)
        if rope is not None:
            query, key = rope(query), rope(key)
        return self.proj(self.attend(query, key, value, segments).flatten(1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        """Queries, keys and values `(T, H, K)` to `(T, H, K)`, within the segments of a pack or their windows."""
        dropout_p = self.dropout_p if self.training else 0.0
        segments = self.segments_of(segments)
        return varlen_attention(query, key, value, segments, dropout_p=dropout_p, backend=self.backend)

    def segments_of(self, segments: Segments) -> Segments:
        """What attends to itself in this layer: the segments of a pack, or their windows."""
        if not self.windowed:
            return segments
        assert segments.windows is not None
        return segments.windows

    def _project(self, hidden_states: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, `(T, H, K)` each."""
        qkv = self.stacked_forward(hidden_states) if self.qkv is None else self.qkv(hidden_states)
        if qkv is not None:
            return qkv.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        return [linear(hidden_states).view(-1, self.num_heads, self.head_dim) for linear in self.qkv_linears]

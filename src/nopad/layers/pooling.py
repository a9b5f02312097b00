"""Pooling of the tokens of each segment to one vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nopad.kernels.attention import varlen_attention
from nopad.layers.dtypes import at_least_float32
from nopad.layers.mlp import MLP
from nopad.layers.roles import RoleAliases
from nopad.segments import Segments


def segment_mean(tokens: Tensor, segments: Segments) -> Tensor:
    """Mean of each segment's tokens, accumulated in at least float32.

    Args:
        tokens: `(T, D)`.
        segments: S segments, none empty.

    Returns:
        `(S, D)` in the dtype of `tokens`.
    """
    if isinstance(segments, Segments) and not len(segments):
        return tokens.new_empty(0, tokens.shape[1])
    # unsafe=True skips checks of the offsets that would read them from the device.
    offsets = segments.cu_seqlens.long()
    mean = torch.segment_reduce(at_least_float32(tokens), "mean", offsets=offsets, axis=0, unsafe=True)
    return mean.to(tokens.dtype)


def attention_pool(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, num_heads: int, backend: str
) -> Tensor:
    """Attention of one query over the tokens of each segment, in one call for all segments.

    Args:
        query: `D` values; every segment has the same query.
        key, value: `(T, D)`.
        segments: S segments, none empty.
        num_heads: a divisor of D.
        backend: as `varlen_attention` takes it.

    Returns:
        `(S, D)`.

    Raises:
        ValueError, ImportError: see `varlen_attention`.
    """
    queries = query.view(1, num_heads, -1).expand(segments.num_segments, -1, -1)
    key, value = (part.unflatten(1, (num_heads, -1)) for part in (key, value))
    query_segments = segments.of_one_token()
    return varlen_attention(queries, key, value, query_segments, segments, backend=backend).flatten(1)


class MAPAttention(nn.Module):
    """Attention of a learned probe over each segment, with the parameters of `torch.nn.MultiheadAttention`."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.backend = "auto"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = NonDynamicallyQuantizableLinear(hidden_size, hidden_size)  # quantisers skip this type

    def forward(self, probe: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
        """`(1, D)` probe and `(T, D)` tokens to `(S, D)`."""
        size = tokens.shape[1]
        query = F.linear(probe, self.in_proj_weight[:size], self.in_proj_bias[:size])
        key, value = F.linear(tokens, self.in_proj_weight[size:], self.in_proj_bias[size:]).chunk(2, dim=1)
        return self.out_proj(attention_pool(query, key, value, segments, self.num_heads, self.backend))


class MAPHead(RoleAliases):
    """Multi-head attention pooling (MAP) with one learned probe, then a residual MLP (Zhai et al., arXiv:2106.04560).

    `names` as `RoleAliases` takes them; the roles are `attention`, `norm` and `mlp`.
    """

    def __init__(self, hidden_size: int, num_heads: int, norm: nn.Module, mlp: MLP, *, names: Mapping[str, str]):
        super().__init__()
        self.names = names
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.attention = MAPAttention(hidden_size, num_heads)
        self.norm = norm
        self.mlp = mlp

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """`(T, D)` to `(S, D)`."""
        pooled = self.attention(self.probe.view(1, -1), tokens, segments)
        return pooled + self.mlp(self.norm(pooled))

    @property
    def num_heads(self) -> int:
        """Heads of the attention."""
        return self.attention.num_heads

    def query_and_keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The query `(1, D)` and the keys `(T, D)` of the attention."""
        size = tokens.shape[1]
        weight, bias = self.attention.in_proj_weight, self.attention.in_proj_bias
        query = F.linear(self.probe.view(1, -1), weight[:size], bias[:size])
        return query, F.linear(tokens, weight[size : 2 * size], bias[size : 2 * size])

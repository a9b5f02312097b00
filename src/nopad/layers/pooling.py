"""From many tokens of a segment to one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nopad.layers.mlp import MLP
from nopad.layers.varlen import varlen_attention
from nopad.layout import Segments


def segment_mean(tokens: Tensor, segments: Segments) -> Tensor:
    """Mean of each segment's tokens, added up in float32.

    Args:
        tokens: `(T, D)`.
        segments: S segments, none empty.

    Returns:
        `(S, D)` in the dtype of `tokens`.
    """
    if not len(segments):
        return tokens.new_empty(0, tokens.shape[1])
    # unsafe=True leaves out the checks of the offsets, which would read them from the device.
    mean = torch.segment_reduce(tokens.float(), "mean", offsets=segments.cu_seqlens.long(), axis=0, unsafe=True)
    return mean.to(tokens.dtype)


def attention_pool(query: Tensor, pairs: Tensor, segments: Segments, num_heads: int, backend: str) -> Tensor:
    """One query's attention over each segment: all segments in one call, without padding.

    Args:
        query: `D` values, the same query for every segment.
        pairs: `(T, 2 · D)` each token's key, then its value.
        segments: S segments, none empty.
        num_heads: a divisor of D.
        backend: as `varlen_attention` takes it.

    Returns:
        `(S, D)`.

    Raises:
        ValueError, ImportError: see `varlen_attention`.
    """
    key, value = pairs.unflatten(1, (2, num_heads, -1)).unbind(1)
    queries = query.view(1, num_heads, -1).expand(len(segments), -1, -1)
    one_each = Segments.of([1] * len(segments), pairs.device)
    return varlen_attention(queries, key, value, one_each, segments, backend=backend).flatten(1)


class ProbeHead(nn.Module):
    """Attention pooling by one learned probe, then a residual feed-forward layer (Zhai et al., arXiv:2106.04560)."""

    def __init__(self, hidden_size: int, num_heads: int, norm: nn.Module, mlp: MLP):
        super().__init__()
        self.num_heads = num_heads
        self.backend = "auto"
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.norm = norm
        self.mlp = mlp

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """`(T, D)` to `(S, D)`."""
        size = tokens.shape[1]
        query = nn.functional.linear(self.probe.view(1, size), self.qkv.weight[:size], self.qkv.bias[:size])
        pairs = nn.functional.linear(tokens, self.qkv.weight[size:], self.qkv.bias[size:])
        pooled = self.proj(attention_pool(query, pairs, segments, self.num_heads, self.backend))
        return pooled + self.mlp(self.norm(pooled))

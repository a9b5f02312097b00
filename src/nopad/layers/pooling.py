"""From many tokens of a segment to one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nopad.kernels.attention import varlen_attention
from nopad.layers.mlp import MLP
from nopad.layers.roles import ByRole
from nopad.segments import Segments


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


def attention_pool(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, num_heads: int, backend: str
) -> Tensor:
    """One query's attention over each segment: all segments in one call, without padding.

    Args:
        query: `D` values, the same query for every segment.
        key, value: `(T, D)`.
        segments: S segments, none empty.
        num_heads: a divisor of D.
        backend: as `varlen_attention` takes it.

    Returns:
        `(S, D)`.

    Raises:
        ValueError, ImportError: see `varlen_attention`.
    """
    queries = query.view(1, num_heads, -1).expand(len(segments), -1, -1)
    key, value = (states.unflatten(1, (num_heads, -1)) for states in (key, value))
    one_each = Segments.of([1] * len(segments), key.device)
    return varlen_attention(queries, key, value, one_each, segments, backend=backend).flatten(1)


class ProbeAttention(nn.Module):
    """Attention of a probe over each segment, with the parameters of `torch.nn.MultiheadAttention`."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.backend = "auto"
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = NonDynamicallyQuantizableLinear(hidden_size, hidden_size)  # quantisers leave it, as torch's

    def forward(self, probe: Tensor, tokens: Tensor, segments: Segments) -> Tensor:
        """`(1, D)` probe and `(T, D)` tokens to `(S, D)`."""
        size = tokens.shape[1]
        query = F.linear(probe, self.in_proj_weight[:size], self.in_proj_bias[:size])
        key, value = F.linear(tokens, self.in_proj_weight[size:], self.in_proj_bias[size:]).chunk(2, dim=1)
        return self.out_proj(attention_pool(query, key, value, segments, self.num_heads, self.backend))


class ProbeHead(ByRole):
    """Attention pooling by one learned probe, then a residual feed-forward layer (Zhai et al., arXiv:2106.04560).

    `names` as `ByRole` takes them; the roles are `attention`, `norm` and `mlp`.
    """

    def __init__(self, hidden_size: int, num_heads: int, norm: nn.Module, mlp: MLP, *, names: Mapping[str, str]):
        super().__init__()
        self.names = names
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.attention = ProbeAttention(hidden_size, num_heads)
        self.norm = norm
        self.mlp = mlp

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """`(T, D)` to `(S, D)`."""
        pooled = self.attention(self.probe.view(1, -1), tokens, segments)
        return pooled + self.mlp(self.norm(pooled))

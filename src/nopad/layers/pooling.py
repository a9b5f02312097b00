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


class ProbeHead(nn.Module):
    """Attention pooling by one learned probe, then a residual feed-forward layer (Zhai et al., arXiv:2106.04560).

    The probe is one query per segment, so that all segments are pooled in one call, without padding.
    """

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
        pair = nn.functional.linear(tokens, self.qkv.weight[size:], self.qkv.bias[size:])
        key, value = pair.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        query = query.view(1, self.num_heads, -1).expand(len(segments), -1, -1)
        one_each = Segments.of([1] * len(segments), tokens.device)
        mixed = varlen_attention(query, key, value, one_each, segments, backend=self.backend)
        pooled = self.proj(mixed.flatten(1))
        return pooled + self.mlp(self.norm(pooled))

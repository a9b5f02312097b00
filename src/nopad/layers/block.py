"""The transformer block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.dtypes import at_least_float32
from nopad.layers.roles import RoleAliases
from nopad.segments import Segments


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        return hidden_states * self.lambda1


def drop_path(hidden_states: Tensor, cu_seqlens: Tensor, rate: float) -> Tensor:
    """Zero all rows of random segments, and divide the others by the share that is kept.

    Stochastic depth (Huang et al., arXiv:1603.09382), as transformers' DINOv2 and DINOv3 draw it for each image.

    Args:
        hidden_states: `(T, D)`.
        cu_seqlens: `(S + 1,)` offsets of the segments.
        rate: probability that a segment is dropped.
    """
    keep = 1 - rate
    drawn = torch.rand(len(cu_seqlens) - 1, dtype=hidden_states.dtype, device=hidden_states.device)
    rows = torch.arange(len(hidden_states), device=cu_seqlens.device)
    segment = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)
    return hidden_states.div(keep) * torch.floor(drawn + keep)[segment, None]


class Block(RoleAliases, GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then feed-forward, each with a residual connection.

    Args:
        norm1, attention, norm2, mlp: the parts.
        layer_scale: multiply both branches by a learned factor per channel.
        drop_path: probability that a branch is skipped in training, for each segment separately.
        names: see `RoleAliases`; the roles are those of the arguments, `layer_scale1` and `layer_scale2`.

    Attributes:
        recompute_mlp: keep the MLP's input for the backward instead of its activations, and compute these again.
    """

    recompute_mlp = False

    def __init__(
        self,
        norm1: nn.Module,
        attention: PackedAttention,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        layer_scale: bool = False,
        drop_path: float = 0.0,
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
        self.drop_path = drop_path

    def forward(self, hidden_states: Tensor, segments: Segments, rope: Rope | None = None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        hidden_states, residual = self.forward_deferred_residual(hidden_states, None, segments, rope)
        return add_residual(residual, hidden_states)

    def forward_deferred_residual(
        self, hidden_states: Tensor, residual: Tensor | None, segments: Segments, rope: Rope | None
    ) -> tuple[Tensor, Tensor]:
        """`forward` without the last residual sum; the caller can fuse it with the next norm.

        Args:
            hidden_states: `(T, D)` output of the block before, not yet added to its residual.
            residual: `(T, D)` that `hidden_states` is added to; `None` for the first block.
            segments, rope: as `forward` takes them.

        Returns:
            Hidden states and residual for the next block; their sum is what `forward` returns.
        """
        residual = hidden_states if residual is None else add_residual(residual, hidden_states)
        hidden_states = self.attention(self.norm1(residual), segments, rope)
        if self.layer_scale1 is not None:
            hidden_states = self.layer_scale1(hidden_states)
        residual = add_residual(residual, self._drop(hidden_states, segments))
        if self.recompute_mlp and torch.is_grad_enabled():
            hidden_states = checkpoint(self._feed_forward, residual, use_reentrant=False)
        else:
            hidden_states = self._feed_forward(residual)
        return self._drop(hidden_states, segments), residual

    def _feed_forward(self, residual: Tensor) -> Tensor:
        hidden_states = self.mlp(self.norm2(residual))
        return hidden_states if self.layer_scale2 is None else self.layer_scale2(hidden_states)

    def _drop(self, branch: Tensor, segments: Segments) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        return drop_path(branch, segments.cu_seqlens, self.drop_path)


def add_residual(residual: Tensor, hidden_states: Tensor) -> Tensor:
    """The residual sum, with the same bits compiled and eager."""
    if torch.compiler.is_compiling():
        # In float32 explicitly: otherwise the compiler lets the GEMM accumulate into a copy of the residual.
        dtype = torch.promote_types(residual.dtype, hidden_states.dtype)
        return (at_least_float32(residual) + at_least_float32(hidden_states)).to(dtype)
    return residual + hidden_states

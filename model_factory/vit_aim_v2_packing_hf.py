"""AIMv2 over packs under the names of its specification; the work is done in `nopad.families.aimv2`.

Each class takes transformers' `Aimv2VisionConfig`. Between them segments travel as `cu_seqlens (S + 1,)` int32;
`AIMv2Packing` takes `hidden_states (T, P)` and `grid_thw (N, 3)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig

from nopad.families.aimv2 import (
    ATTENTION_NAMES,
    BLOCK_NAMES,
    MLP_NAMES,
    AIMv2Embeddings,
    AIMv2Packing,
    aimv2_block,
)
from nopad.families.aimv2_checkpoints import AIMv2PackingConfig
from nopad.inference.runner import EagerRunner
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import GatedMLP
from nopad.layout import Layout
from nopad.segments import Segments

__all__ = [
    "AIMv2Packing",
    "Aimv2MLP",
    "Aimv2PackingAttention",
    "Aimv2PackingEncoder",
    "Aimv2PackingEncoderLayer",
    "Aimv2RMSNorm",
    "Aimv2VisionEmbeddings",
]


def _packing_config(config: Aimv2VisionConfig) -> AIMv2PackingConfig:
    return config if isinstance(config, AIMv2PackingConfig) else AIMv2PackingConfig.from_dict(config.to_dict())


def _segments(segments: Tensor | Segments) -> Segments:
    """Offsets as the layers want them; a tensor of them is read from the device once."""
    if isinstance(segments, Segments):
        return segments
    return Segments.of(segments.diff().tolist(), segments.device)


class Aimv2RMSNorm(nn.RMSNorm):
    """RMS normalisation over the last axis."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps)


class Aimv2MLP(GatedMLP):
    """Gated feed-forward layer, `(T, D)` to `(T, D)`."""

    def __init__(self, config: Aimv2VisionConfig):
        super().__init__(
            config.hidden_size,
            config.intermediate_size,
            ACT2FN[config.hidden_act],
            bias=config.mlp_bias,
            names=MLP_NAMES,
        )


class Aimv2VisionEmbeddings(AIMv2Embeddings):
    """Patches `(T, P)` to tokens `(T, D)` with their positions."""

    def __init__(self, config: Aimv2VisionConfig):
        super().__init__(_packing_config(config))
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding.weight, std=config.initializer_range)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor | Layout) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`grid_thw` is `(N, 3)`."""
        if not isinstance(grid_thw, Layout):
            grid_thw = Layout.read(hidden_states, grid_thw, None, self.proj.weight[0].numel())
        return super().forward(hidden_states, grid_thw, EagerRunner())


class Aimv2PackingAttention(PackedAttention):
    """Self-attention within segments by `flash_attn_varlen_func`, or the same interface where it is not there."""

    def __init__(self, config: Aimv2VisionConfig):
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            qkv_bias=config.qkv_bias,
            proj_bias=config.qkv_bias,
            dropout_p=config.attention_dropout,
            names=ATTENTION_NAMES,
        )

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor | Segments) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`(T, D)` to `(T, D)`."""
        return super().forward(hidden_states, _segments(cu_seqlens))


class Aimv2PackingEncoderLayer(Block):
    """One pre-norm transformer layer."""

    def __init__(self, config: Aimv2VisionConfig):
        block = aimv2_block(_packing_config(config))
        super().__init__(block.norm1, block.attention, block.norm2, block.mlp, names=BLOCK_NAMES)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor | Segments) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`(T, D)` to `(T, D)`."""
        return super().forward(hidden_states, _segments(cu_seqlens))


class Aimv2PackingEncoder(nn.Module):
    """All transformer layers; a loop over layers, none over images."""

    def __init__(self, config: Aimv2VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Aimv2PackingEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, inputs_embeds: Tensor, cu_seqlens: torch.Tensor) -> BaseModelOutput:
        """`(T, D)` to a `BaseModelOutput` whose `last_hidden_state` is `(T, D)`, before the final norm."""
        segments = _segments(cu_seqlens)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, segments)
        return BaseModelOutput(last_hidden_state=hidden_states)

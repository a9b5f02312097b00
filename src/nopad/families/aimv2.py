"""AIMv2 (Fini et al., arXiv:2411.14402): a pre-RMSNorm transformer with gated feed-forward layers and no biases."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.checkpoint import Checkpoint, Dialect
from nopad.encoder import PackedEncoder, Trunk
from nopad.families.aimv2_checkpoints import (
    DIALECTS,
    PUBLISHED,
    AIMv2PackingConfig,
    read_config,
    trained_grid,
)
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import GatedMLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import attention_pool
from nopad.layers.positions import is_strict, learned_positions, sincos_2d
from nopad.layout import Layout, Segments
from nopad.original import Original
from nopad.preprocessing import Preprocessing


class AIMv2Embeddings(nn.Module):
    """Patches to tokens: a linear map, RMSNorm, then positions, sine-cosine or learned."""

    def __init__(self, config: AIMv2PackingConfig):
        super().__init__()
        patch_dim = config.patch_size**2 * config.num_channels  # pyright: ignore[reportOperatorIssue]
        self.proj = PatchEmbedding(patch_dim, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.trained_grid = trained_grid(config)
        self.strict = is_strict(config.positions)
        if not config.is_native:
            self.position_embedding = nn.Parameter(torch.empty(math.prod(self.trained_grid), config.hidden_size))
        else:
            self.register_parameter("position_embedding", None)

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        tokens = self.norm(self.proj(hidden_states))
        return tokens + self.positions(layout, tokens.dtype).to(tokens.dtype)

    def positions(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """`(T, D)`, computed in float32; already in `dtype` where that changes no bit.

        Raises:
            ValueError: see `learned_positions`.
        """
        if self.position_embedding is None:
            return sincos_2d(layout, self.proj.out_features, dtype)
        table, grid = self.position_embedding, self.trained_grid
        return learned_positions(layout, table, grid, mode="bicubic", strict=self.strict, dtype=dtype)


class AIMv2Head(nn.Module):
    """Attention pooling with one learned query that has no projection of its own."""

    def __init__(self, config: AIMv2PackingConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.backend = "auto"
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """`(T, D)` to `(S, D)`."""
        pairs = self.kv(tokens)
        query = self.cls_token.to(pairs.dtype)
        return self.proj(attention_pool(query, pairs, segments, self.num_heads, self.backend))


def aimv2_block(config: AIMv2PackingConfig) -> Block:
    """One transformer block of the family."""
    norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=config.qkv_bias,
        proj_bias=config.qkv_bias,
        dropout_p=config.attention_dropout,
    )
    activation = ACT2FN[config.hidden_act]
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation, bias=config.mlp_bias)
    return Block(norm(), attention, norm(), mlp)


class AIMv2Packing(PackedEncoder):
    """AIMv2 over packs; a clip's frames are separate segments.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = AIMv2PackingConfig
    family = "aimv2"
    dialects = DIALECTS
    published = PUBLISHED
    _no_split_modules = {"Block", "AIMv2Embeddings", "AIMv2Head"}  # noqa: RUF012 - as transformers declares it

    def build(self) -> None:
        """Embeddings, blocks, norm, and where the checkpoint has them head and projection."""
        config = self.config
        self.embeddings = AIMv2Embeddings(config)
        self.layers = nn.ModuleList(aimv2_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = AIMv2Head(config) if config.use_head else None
        width = config.projection_dim
        self.projection = None if width is None else nn.Linear(config.hidden_size, width, bias=False)

    def trunk(self, hidden_states: Tensor, layout: Layout, states: list[Tensor] | None) -> Trunk:
        """Patches to normed tokens."""
        tokens = self.run_layers(self.embeddings(hidden_states, layout), layout.frames, None, states)
        return Trunk(self.norm(tokens), hidden_states=None if states is None else tuple(states))

    def example_positions(self) -> Tensor:
        """Positions on the trained grid."""
        return self.embeddings.positions(Layout.of_image(*self.embeddings.trained_grid, self.device), self.dtype)

    @property
    def projection_dim(self) -> int | None:
        """Width of the image-text space."""
        return self.config.projection_dim

    def project(self, pooled: Tensor) -> Tensor | None:
        """`(N, D)` to `(N, projection_dim)`."""
        return None if self.projection is None else self.projection(pooled)

    @property
    def default_preprocessing(self) -> Preprocessing:
        """Native: as it is; fixed size: CLIP's resize and crop to the trained size."""
        statistics: dict[str, Any] = {
            "resample": "bicubic",
            "mean": tuple(OPENAI_CLIP_MEAN),
            "std": tuple(OPENAI_CLIP_STD),
        }
        if self.config.is_native:
            return Preprocessing(rule="native", **statistics)
        return Preprocessing(rule="crop", size=self.config.image_size, **statistics)

    @classmethod
    def read_config(cls, checkpoint: Checkpoint, dialect: Dialect) -> AIMv2PackingConfig:
        """The architecture, from config and tensors."""
        return read_config(checkpoint, dialect)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AIMv2Embeddings) and module.position_embedding is not None:
            init.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, AIMv2Head):
            init.normal_(module.cls_token, std=self.config.initializer_range)


class AIMv2Original(Original):
    """transformers' AIMv2."""

    model_class = Aimv2VisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """Learned positions: the trained grid."""
        return None if packed.config.is_native else trained_grid(packed.config)


AIMv2Packing.register_conversions()

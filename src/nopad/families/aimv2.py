"""AIMv2 (Fini et al., arXiv:2411.14402): a pre-RMSNorm transformer with gated feed-forward layers and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.aimv2_checkpoints import (
    PUBLISHED,
    TEXT_RULES,
    AIMv2PackingConfig,
    read_config,
)
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import GatedMLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import attention_pool
from nopad.layers.position_table import PositionTable
from nopad.layers.positions import is_strict, sincos_2d
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing
from nopad.segments import Segments

ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"}
MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
BLOCK_NAMES = {"norm1": "rms_norm1", "norm2": "rms_norm2", "mlp": "ffn"}


class AIMv2Embeddings(RoleAliases):
    """Patches to tokens: a linear map, RMSNorm, then positions, sine-cosine or learned."""

    names: Mapping[str, str] = {"proj": "patch_embed", "norm": "rms_norm"}

    def __init__(self, config: AIMv2PackingConfig):
        super().__init__()
        patch_size: int = config.patch_size  # pyright: ignore[reportAssignmentType] - a number in every checkpoint
        self.proj = PatchEmbedding(config.num_channels, config.hidden_size, patch_size, config.patch_order)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        strict = is_strict(config.positions)
        self.position_embedding = None
        if config.is_native:
            if strict:
                raise ValueError(
                    "positions: native checkpoints compute theirs for any grid, got 'strict'; leave it out"
                )
            if config.hidden_size % 4:
                raise ValueError(
                    f"hidden_size: expected a multiple of 4 for sines and cosines of rows and columns, got "
                    f"{config.hidden_size}"
                )
        else:
            self.position_embedding = PositionTable(
                trained_grid(config), config.hidden_size, mode="bicubic", strict=strict
            )

    def forward(self, patches: Tensor, layout: Layout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        tokens = self.norm(runner.embed(self.proj, patches))
        return tokens + self.positions(layout)

    def positions(self, layout: Layout) -> Tensor:
        """`(T, D)`, rounded to the dtype of the weights; see `PositionTable`.

        Raises:
            ValueError: see `PositionTable`.
        """
        if self.position_embedding is None:
            return sincos_2d(layout, len(self.proj.weight), self.norm.weight.dtype)
        return self.position_embedding(layout)


class AIMv2Head(RoleAliases):
    """Attention pooling with one learned query that has no projection of its own."""

    names: Mapping[str, str] = {"k": "k_proj", "v": "v_proj", "proj": "output_proj"}

    def __init__(self, config: AIMv2PackingConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.backend = "auto"
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.k = nn.Linear(size, size, bias=config.qkv_bias)
        self.v = nn.Linear(size, size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)

    def forward(self, tokens: Tensor, segments: Segments) -> Tensor:
        """`(T, D)` to `(S, D)`."""
        query, key = self.query_and_keys(tokens)
        return self.proj(attention_pool(query, key, self.v(tokens), segments, self.num_heads, self.backend))

    def query_and_keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The query, D values, and the keys `(T, D)`."""
        key = self.k(tokens)
        return self.cls_token.to(key.dtype), key


def aimv2_block(config: AIMv2PackingConfig) -> Block:
    """One transformer block of the family."""
    norm = partial(nn.RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=config.qkv_bias,
        proj_bias=config.qkv_bias,
        dropout_p=config.attention_dropout,
        names=ATTENTION_NAMES,
    )
    activation = ACT2FN[config.hidden_act]
    mlp = GatedMLP(config.hidden_size, config.intermediate_size, activation, bias=config.mlp_bias, names=MLP_NAMES)
    return Block(norm(), attention, norm(), mlp, names=BLOCK_NAMES)


class AIMv2Packing(PackedEncoder):
    """AIMv2 over packs; a clip's frames are separate segments.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = AIMv2PackingConfig
    family = "aimv2"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    text_rules = TEXT_RULES
    config_without_head = MappingProxyType({"use_head": False, "projection_dim": None})
    names: Mapping[str, str] = {"layers": "encoder.layers", "norm": "rms_norm", "projection": "visual_projection"}

    def build(self) -> None:
        """Embeddings, blocks, norm, and where the checkpoint has them head and projection."""
        config = self.config
        self.embeddings = AIMv2Embeddings(config)
        self.encoder = nn.Module()
        self.layers = nn.ModuleList(aimv2_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.use_head:
            self.head = AIMv2Head(config)
        if config.projection_dim is not None:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        tokens = self.embeddings(patches, layout, runner)
        return Trunk(self.norm(runner.run(self.layers, tokens, layout.frames, None)))

    @staticmethod
    def published_preprocessing(config: AIMv2PackingConfig) -> Preprocessing:
        """Native: as it is; fixed size: CLIP's resize and crop to the trained size."""
        size: Any = config.image_size
        statistics: dict[str, Any] = {
            "resample": "bicubic",
            "mean": tuple(OPENAI_CLIP_MEAN),
            "std": tuple(OPENAI_CLIP_STD),
        }
        if config.is_native:
            return Preprocessing(rule="native", **statistics)
        return Preprocessing(rule="crop", size=size, **statistics)

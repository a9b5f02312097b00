"""Perception Encoder (Bolya et al., arXiv:2504.13181): PE core, lang and spatial."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.pe_checkpoints import PUBLISHED, PEPackingConfig, check_config, read_config
from nopad.families.pe_text import TEXT_RULES
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.block import Block
from nopad.layers.mlp import MLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import MAPHead, segment_mean
from nopad.layers.position_table import PositionTable
from nopad.layers.positions import check_mode, is_strict
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layers.rope import channel_frequencies, check_two_axes
from nopad.layers.rope_3d import apply_rotary_interleaved
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing
from nopad.segments import Segments

POOLING_MLP_RATIO = 4
"""Width of the feed-forward layer of the pooling, in widths of the model; no config has it."""


class PEEmbeddings(RoleAliases):
    """Patches to tokens with learned positions, and in front of each segment the CLS token, where there is one.

    Other grids get the table resampled as `_sample_abs_posemb` of Meta's model does, or as timm does.
    """

    names: Mapping[str, str] = {"proj": "patch_embedding"}

    def __init__(self, config: PEPackingConfig):
        super().__init__()
        size, has_class_token = config.hidden_size, config.use_class_token
        self.class_embedding = nn.Parameter(torch.empty(size)) if has_class_token else None
        self.proj = PatchEmbedding(config.num_channels, size, config.patch_size, config.patch_order, bias=False)
        options: dict[str, Any] = {"mode": check_mode(config.positions_mode), "antialias": config.positions_antialias}
        options |= {"strict": is_strict(config.positions), "num_prefix_tokens": int(has_class_token)}
        self.position_embedding = PositionTable(trained_grid(config), size, **options)

    def forward(self, patches: Tensor, layout: Layout, prefix_layout: PrefixLayout | None, runner: Runner) -> Tensor:
        """`(T, P)` to `(T + S, D)`, or `(T, D)` without a CLS token, where `prefix_layout` is `None`."""
        tokens = runner.embed(self.proj, patches) + self.position_embedding(layout)
        if prefix_layout is None:
            return tokens
        assert self.class_embedding is not None
        cls_token = self.class_embedding + self.position_embedding(None)
        return prefix_layout.join(tokens, cls_token.expand(prefix_layout.segments.num_segments, -1, -1))


def pe_mlp(config: PEPackingConfig, intermediate_size: int) -> MLP:
    """The feed-forward layer of a block and of the pooling."""
    names = {"up": "c_fc", "down": "c_proj"}
    return MLP(config.hidden_size, intermediate_size, ACT2FN[config.hidden_act], bias=True, names=names)


def pe_block(config: PEPackingConfig) -> Block:
    """One transformer block of the family."""
    norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=True,
        proj_bias=True,
        dropout_p=config.attention_dropout or 0.0,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "out_proj"},
    )
    names = {"norm1": "ln_1", "attention": "attn", "layer_scale1": "ls_1", "norm2": "ln_2", "layer_scale2": "ls_2"}
    mlp = pe_mlp(config, config.intermediate_size)
    return Block(norm(), attention, norm(), mlp, layer_scale=config.use_layer_scale, names=names)


def columns_and_rows(config: PEPackingConfig, layout: Layout) -> Tensor:
    """Column and row of each patch, `(T, 2)` float32; with `rope_grid_side` scaled as timm's `_build_grid` does."""
    places = layout.coordinates[:, [2, 1]].float() + config.rope_offset
    if config.rope_grid_side is None:
        return places
    if layout.patch_positions is not None:  # which are on the trained grid
        return places / trained_grid(config)[0] * config.rope_grid_side
    return places / layout.grid_thw[layout.image_index][:, [2, 1]] * config.rope_grid_side


class PEPacking(PackedEncoder):
    """Perception Encoder over packs; a clip's frames are separate segments, each with a CLS token where there is one.

    PE core pools the normed tokens, that of CLS among them, by attention. PE lang and spatial have no pooling of their
    own: `pooled` is the mean of the patches, as timm's.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = PEPackingConfig
    family = "pe"
    published = PUBLISHED
    text_rules = TEXT_RULES
    read_config = staticmethod(read_config)
    config_without_head = MappingProxyType({"use_head": False, "projection_dim": None})
    head_reads_prefix = True
    names: Mapping[str, str] = {
        "norm_pre": "ln_pre",
        "layers": "transformer.resblocks",
        "norm": "ln_post",
        "head": "attn_pool",
    }

    def build(self) -> None:
        """Embeddings, a norm, blocks, and where the checkpoint has them a norm, pooling and the projection."""
        config = self.config
        check_config(config)
        check_two_axes(self._head_dim)
        self.embeddings = PEEmbeddings(config)
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.norm_pre = norm()
        self.transformer = nn.Module()
        self.layers = nn.ModuleList(pe_block(config) for _ in range(config.num_hidden_layers))
        self.norm = norm() if config.use_final_norm else None
        if config.use_head:
            mlp = pe_mlp(config, POOLING_MLP_RATIO * config.hidden_size)
            names = {"attention": "attn", "norm": "layernorm"}
            self.head = MAPHead(config.hidden_size, config.num_pooling_heads, norm(), mlp, names=names)
        if config.projection_dim is not None:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens, normed where the checkpoint has the final norm."""
        prefix_layout = PrefixLayout.of(layout, 1) if self.num_prefix_tokens else None
        segments = layout.frames if prefix_layout is None else prefix_layout.segments
        tokens = self.norm_pre(self.embeddings(patches, layout, prefix_layout, runner))
        tokens = runner.run(self.layers, tokens, segments, self.rope(layout, prefix_layout))
        tokens = tokens if self.norm is None else self.norm(tokens)
        if prefix_layout is None:
            return Trunk(tokens)
        return Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens))

    def rope(self, layout: Layout, prefix_layout: PrefixLayout | None) -> Rope:
        """Rotary embedding over neighbouring channels: the column's frequencies, then the row's; CLS is not rotated."""
        frequencies = channel_frequencies((self._head_dim // 4,), self.config.rope_theta, layout.device)
        places = columns_and_rows(self.config, layout)
        angles = (places[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=1)
        if prefix_layout is not None:
            angles = prefix_layout.join(angles, angles.new_zeros(*prefix_layout.prefix.shape, angles.shape[1]))
        return Rope(apply_rotary_interleaved, angles.cos()[:, None], angles.sin()[:, None])

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`: by attention over all tokens, else the mean of the patches."""
        return segment_mean(trunk.tokens, segments) if self.head is None else super().pool_segments(trunk, segments)

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of one row of patches, and of the CLS token where there is one."""
        layout = Layout.of_image(1, rows - self.num_prefix_tokens, self.device)
        return self.rope(layout, PrefixLayout.of(layout, 1) if self.num_prefix_tokens else None)

    @staticmethod
    def count_prefix_tokens(config: PEPackingConfig) -> int:
        """The CLS token, where there is one."""
        return int(config.use_class_token)

    @staticmethod
    def published_preprocessing(config: PEPackingConfig) -> Preprocessing:
        """A square of the trained size."""
        statistics: dict[str, Any] = {"mean": tuple(IMAGENET_STANDARD_MEAN), "std": tuple(IMAGENET_STANDARD_STD)}
        return Preprocessing(rule="square", size=config.image_size, resample="bilinear", **statistics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PEEmbeddings):
            std = self.config.hidden_size**-0.5  # as Meta's
            init.normal_(module.position_embedding.weight, std=std)
            if module.class_embedding is not None:
                init.normal_(module.class_embedding, std=std)

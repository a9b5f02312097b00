"""CLIP (Radford et al., arXiv:2103.00020), OpenCLIP, MetaCLIP 1 and 2, DFN: the image towers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.clip_blocks import clip_block
from nopad.families.clip_checkpoints import (
    PUBLISHED,
    CLIPConfigs,
    CLIPPackingConfig,
    MetaCLIP2PackingConfig,
    read_config,
)
from nopad.families.clip_text import TEXT_RULES
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention
from nopad.layers.mlp import MLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.position_table import PositionTable
from nopad.layers.positions import is_strict
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.transforms import Preprocessing


class CLIPEmbeddings(RoleAliases):
    """Patches to tokens with learned positions, and in front of each segment the CLS token with a position of its own.

    Other grids get the table resampled as `interpolate_pos_encoding` of transformers' model does.
    """

    names: Mapping[str, str] = {"proj": "patch_embedding"}

    def __init__(self, config: CLIPConfigs):
        super().__init__()
        size = config.hidden_size
        patch_size: int = config.patch_size  # pyright: ignore[reportAssignmentType] - a number in every checkpoint
        self.class_embedding = nn.Parameter(torch.empty(size))
        self.proj = PatchEmbedding(config.num_channels, size, patch_size, config.patch_order, bias=False)
        antialias, strict = config.positions_antialias, is_strict(config.positions)
        self.position_embedding = PositionTable(
            trained_grid(config), size, mode="bicubic", antialias=antialias, strict=strict, num_prefix_tokens=1
        )

    def forward(self, patches: Tensor, layout: Layout, prefix_layout: PrefixLayout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T + S, D)`."""
        tokens = runner.embed(self.proj, patches) + self.position_embedding(layout)
        cls_token = self.class_embedding + self.position_embedding(None)
        return prefix_layout.join(tokens, cls_token.expand(prefix_layout.segments.num_segments, -1, -1))


class CLIPPacking(PackedEncoder):
    """CLIP's image tower over packs; a clip's frames are separate segments, each with a CLS token of its own.

    Tokens are normed by `post_layernorm`, as OpenCLIP and timm return them. transformers norms the CLS token alone, so
    that its `last_hidden_state` is the last of `hidden_states` here.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = CLIPPackingConfig
    family = "clip"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    config_without_head = MappingProxyType({"with_projection": False})
    names: Mapping[str, str] = {
        "norm_pre": "pre_layrnorm",
        "layers": "encoder.layers",
        "norm": "post_layernorm",
        "projection": "visual_projection",
    }
    text_rules = TEXT_RULES

    def build(self) -> None:
        """Embeddings, a norm, blocks, a norm, and where the checkpoint has it the projection."""
        config = self.config
        self.embeddings = CLIPEmbeddings(config)
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.norm_pre = norm()
        self.encoder = nn.Module()
        self.layers = nn.ModuleList(clip_block(config, norm) for _ in range(config.num_hidden_layers))
        self.norm = norm()
        if config.with_projection:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        prefix_layout = PrefixLayout.of(layout, self.num_prefix_tokens)
        tokens = self.norm_pre(self.embeddings(patches, layout, prefix_layout, runner))
        tokens = self.norm(runner.run(self.layers, tokens, prefix_layout.segments, None))
        return Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens))

    @staticmethod
    def count_prefix_tokens(config: CLIPConfigs) -> int:
        """The CLS token."""
        return 1

    @staticmethod
    def published_preprocessing(config: CLIPConfigs) -> Preprocessing:
        """The short side to the trained size, and a square crop of it."""
        size: Any = config.image_size
        statistics: dict[str, Any] = {"mean": tuple(OPENAI_CLIP_MEAN), "std": tuple(OPENAI_CLIP_STD)}
        return Preprocessing(rule="crop", size=size, resample="bicubic", **statistics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        size, factor = self.config.hidden_size, self.config.initializer_factor
        residual_std = size**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5 * factor
        if isinstance(module, CLIPEmbeddings):
            init.normal_(module.class_embedding, std=size**-0.5 * factor)
        elif isinstance(module, PackedAttention):
            for linear in (module.q, module.k, module.v):
                init.normal_(linear.weight, std=residual_std)
            init.normal_(module.proj.weight, std=size**-0.5 * factor)
        elif isinstance(module, MLP):
            init.normal_(module.up.weight, std=(2 * size) ** -0.5 * factor)
            init.normal_(module.down.weight, std=residual_std)
        elif self.projection is not None and module is self.projection:
            init.normal_(self.projection.weight, std=size**-0.5 * factor)


class MetaCLIP2Packing(CLIPPacking):
    """MetaCLIP 2; what `CLIPPacking` makes of such a config or checkpoint."""

    config_class = MetaCLIP2PackingConfig

"""SigLIP2 (Tschannen et al., arXiv:2502.14786) and SigLIP (Zhai et al., arXiv:2303.15343): NaFlex and fixed sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from nopad.checkpoints.formats import grid_side, trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.clip_blocks import clip_block, clip_mlp
from nopad.families.siglip2_checkpoints import (
    PUBLISHED,
    Siglip2PackingConfig,
    SiglipConfigs,
    SiglipPackingConfig,
    read_config,
)
from nopad.families.siglip2_text import TEXT_RULES
from nopad.inference.runner import Runner
from nopad.layers.patch_embed import PatchEmbedding, reorder_patches
from nopad.layers.pooling import MAPAttention, MAPHead
from nopad.layers.position_table import PositionTable
from nopad.layers.positions import is_strict
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing


def is_naflex(config: SiglipConfigs) -> bool:
    """Whether the model was trained on grids of any size."""
    return isinstance(config, Siglip2PackingConfig)


class Siglip2Embeddings(RoleAliases):
    """Patches to tokens: a linear map, then learned positions.

    NaFlex resizes them as its `resize_positional_embeddings`, SigLIP as its `interpolate_pos_encoding`.
    """

    names: Mapping[str, str] = {"proj": "patch_embedding"}

    def __init__(self, config: SiglipConfigs):
        super().__init__()
        patch_size: int = config.patch_size  # pyright: ignore[reportAssignmentType] - a number in every checkpoint
        self.patch_size, self.order = patch_size, config.patch_order
        self.naflex = is_naflex(config)
        channels, size, strict = config.num_channels, config.hidden_size, is_strict(config.positions)
        if self.naflex:
            self.proj = nn.Linear(patch_size**2 * channels, size)
            side = grid_side(config.num_patches, "num_patches")  # pyright: ignore[reportAttributeAccessIssue]
            self.position_embedding = PositionTable((side, side), size, mode="bilinear", native=True)
        else:
            self.proj = PatchEmbedding(channels, size, patch_size, self.order)
            antialias = config.positions_antialias  # pyright: ignore[reportAttributeAccessIssue]
            grid = trained_grid(config)
            self.position_embedding = PositionTable(grid, size, mode="bicubic", antialias=antialias, strict=strict)

    def forward(self, patches: Tensor, layout: Layout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        if self.naflex:  # whose linear map takes patches in this order
            patches = reorder_patches(patches, self.patch_size, self.order, "hwc")
        tokens = runner.embed(self.proj, patches)
        return tokens + self.position_embedding(layout)


class Siglip2NaflexPacking(PackedEncoder):
    """SigLIP2 and SigLIP over packs; a clip's frames are separate segments.

    `pooled` is the vector that the image-text space compares; there is no projection after it.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = Siglip2PackingConfig
    family = "siglip2"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    text_rules = TEXT_RULES
    config_without_head = MappingProxyType({"vision_use_head": False})
    names: Mapping[str, str] = {"layers": "encoder.layers", "norm": "post_layernorm"}

    def build(self) -> None:
        """Embeddings, blocks, norm, and where the checkpoint has it the head."""
        config = self.config
        if is_naflex(config) and is_strict(config.positions):
            raise ValueError("positions: NaFlex checkpoints resample theirs for every image, got 'strict'")
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.embeddings = Siglip2Embeddings(config)
        self.encoder = nn.Module()
        self.layers = nn.ModuleList(clip_block(config, norm) for _ in range(config.num_hidden_layers))
        self.norm = norm()
        if config.vision_use_head:
            mlp, names = clip_mlp(config), {"norm": "layernorm"}
            self.head = MAPHead(config.hidden_size, config.num_attention_heads, norm(), mlp, names=names)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        tokens = self.embeddings(patches, layout, runner)
        return Trunk(self.norm(runner.run(self.layers, tokens, layout.frames, None)))

    @staticmethod
    def published_preprocessing(config: SiglipConfigs) -> Preprocessing:
        """NaFlex: at most 256 patches in the image's aspect ratio; fixed size: resized to the trained square."""
        statistics: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        if is_naflex(config):
            return Preprocessing(rule="naflex", resample="bilinear", **statistics)
        size: Any = config.image_size  # pyright: ignore[reportAttributeAccessIssue] - a fixed size
        return Preprocessing(rule="square", size=size, resample="bicubic", **statistics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        size = self.config.hidden_size
        if isinstance(module, PositionTable):
            init.normal_(module.weight, std=size**-0.5)
        elif isinstance(module, MAPHead):
            init.normal_(module.probe, std=size**-0.5)
        elif isinstance(module, MAPAttention):
            init.normal_(module.in_proj_weight, std=size**-0.5)
            init.zeros_(module.in_proj_bias)


class SiglipPacking(Siglip2NaflexPacking):
    """SigLIP2 and SigLIP of one fixed size; what `Siglip2NaflexPacking` makes of such a config or checkpoint."""

    config_class = SiglipPackingConfig

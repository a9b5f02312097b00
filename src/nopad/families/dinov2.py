"""DINOv2 (Oquab et al., arXiv:2304.07193), with and without registers (Darcet et al., arXiv:2309.16588)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.dinov2_checkpoints import (
    PUBLISHED,
    DINOv2Configs,
    DINOv2PackingConfig,
    DINOv2WithRegistersPackingConfig,
    read_config,
    swiglu_size,
)
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import MLP, GatedMLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.position_table import table_positions
from nopad.layers.positions import is_strict
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import ByRole
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing


class DINOv2Embeddings(ByRole):
    """Patches to tokens with learned positions, and each segment's CLS and register tokens in front of them.

    CLS has a position of its own, the first row of the table, and registers have none. Other grids get the table
    resampled as `interpolate_pos_encoding` of transformers' models does, which antialiases with registers alone; those
    in timm's layout are antialiased always, as timm does. Meta's
    own code computes the scale of models without registers from a side that is 0.1 patches longer.
    """

    names: Mapping[str, str] = {"proj": "patch_embeddings.projection"}

    def __init__(self, config: DINOv2Configs):
        super().__init__()
        size = config.hidden_size
        patch_size: int = config.patch_size  # pyright: ignore[reportAssignmentType] - a number in every checkpoint
        self.patch_embeddings = nn.Module()
        self.proj = PatchEmbedding(config.num_channels, size, patch_size, config.patch_order)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        # For masked training alone; kept so that a saved checkpoint is complete.
        self.mask_token = nn.Parameter(torch.empty(1, size)) if config.use_mask_token else None
        self.grid, self.strict = trained_grid(config), is_strict(config.positions)
        self.antialias = config.positions_antialias
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        rows, columns = self.grid
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + rows * columns, size))
        self.register_tokens = None
        if isinstance(config, DINOv2WithRegistersPackingConfig):
            self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, size))

    def forward(self, patches: Tensor, layout: Layout, places: PrefixLayout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T + S · num_prefix_tokens, D)`."""
        tokens = runner.embed(self.proj, patches) + self.positions(layout)
        prefix = self.cls_token + self.position_embeddings[:, :1]
        if self.register_tokens is not None:
            prefix = torch.cat((prefix, self.register_tokens), dim=1)
        return self.dropout(places.join(tokens, prefix.expand(places.segments.num_segments, -1, -1)))

    def positions(self, layout: Layout) -> Tensor:
        """`(T, D)` positions of the patches, rounded to the dtype of the weights.

        Raises:
            ValueError: see `table_positions`.
        """
        table = self.position_embeddings[0, 1:]
        return table_positions(layout, table, self.grid, mode="bicubic", antialias=self.antialias, strict=self.strict)


def dinov2_block(config: DINOv2Configs) -> Block:
    """One transformer block of the family."""
    size, mlp_size = config.hidden_size, config.hidden_size * config.mlp_ratio
    norm = partial(nn.LayerNorm, size, eps=config.layer_norm_eps)
    attention = PackedAttention(
        size,
        config.num_attention_heads,
        qkv_bias=config.qkv_bias,
        proj_bias=True,
        dropout_p=config.attention_probs_dropout_prob,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"},
    )
    if config.use_swiglu_ffn:
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        mlp = GatedMLP(size, swiglu_size(mlp_size), ACT2FN["silu"], bias=True, names=names)
    else:
        mlp = MLP(size, mlp_size, ACT2FN[config.hidden_act], bias=True, names={"up": "fc1", "down": "fc2"})
    return Block(norm(), attention, norm(), mlp, layer_scale=True, drop_path=config.drop_path_rate, names={})


class DINOv2Packing(PackedEncoder):
    """DINOv2 over packs; a clip's frames are separate segments, each with CLS and register tokens of its own.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = DINOv2PackingConfig
    family = "dinov2"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    names: Mapping[str, str] = {"layers": "encoder.layer", "norm": "layernorm"}

    def build(self) -> None:
        """Embeddings, blocks and norm."""
        config = self.config
        self.embeddings = DINOv2Embeddings(config)
        self.encoder = nn.Module()
        self.layers = nn.ModuleList(dinov2_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        places = PrefixLayout.of(layout, self.num_prefix_tokens)
        tokens = self.embeddings(patches, layout, places, runner)
        tokens = self.norm(runner.run(self.layers, tokens, places.segments, None))
        return Trunk(places.take_patches(tokens), places.take_prefix(tokens))

    def example_positions(self) -> Tensor:
        """Positions on the trained grid."""
        rows, columns = self.embeddings.grid
        return self.embeddings.positions(Layout.of_image(rows, columns, self.device))

    @staticmethod
    def count_prefix_tokens(config: DINOv2Configs) -> int:
        """The CLS token, and registers."""
        return 1 + (config.num_register_tokens if isinstance(config, DINOv2WithRegistersPackingConfig) else 0)

    @staticmethod
    def published_preprocessing(config: DINOv2Configs) -> Preprocessing:
        """The short side to 256 pixels and a crop of 224, whatever size the positions were learned on."""
        statistics: dict[str, Any] = {"mean": tuple(IMAGENET_DEFAULT_MEAN), "std": tuple(IMAGENET_DEFAULT_STD)}
        return Preprocessing(rule="crop", size=224, short_side=256, resample="bicubic", **statistics)


class DINOv2WithRegistersPacking(DINOv2Packing):
    """DINOv2 with registers; what `DINOv2Packing` makes of such a config or checkpoint."""

    config_class = DINOv2WithRegistersPackingConfig

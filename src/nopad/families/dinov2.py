"""DINOv2 (Oquab et al., arXiv:2304.07193), with and without registers (Darcet et al., arXiv:2309.16588), and the image
encoder of TIPSv2 (Cao et al., arXiv:2604.12012).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nopad.checkpoints.dialects.dinov2 import TIPSV2_DIALECTS
from nopad.encoder import PackedEncoder
from nopad.families.dinov2_checkpoints import (
    PUBLISHED,
    DINOv2Configs,
    DINOv2PackingConfig,
    DINOv2WithRegistersPackingConfig,
    TIPSv2PackingConfig,
    num_registers,
    read_config,
)
from nopad.families.vit_blocks import mlp_by_ratio, vit_block
from nopad.families.vit_embeddings import ViTEmbeddings
from nopad.inference.runner import Runner
from nopad.layers.block import Block
from nopad.layers.prefix import PrefixLayout
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing


class DINOv2Embeddings(ViTEmbeddings):
    """Embeddings of plain vision transformers, and register tokens, which have no positions, behind CLS.

    transformers antialiases the positions of models with registers alone, and resamples those of TIPSv2 bilinearly.
    Meta's own code computes the scale of models without registers from a side that is 0.1 patches longer.
    """

    def __init__(self, config: DINOv2Configs):
        super().__init__(config)
        size = config.hidden_size
        # For masked training alone; kept so that a saved checkpoint is complete.
        self.mask_token = nn.Parameter(torch.empty(1, size)) if config.use_mask_token else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        number = num_registers(config)
        self.register_tokens = None if number is None else nn.Parameter(torch.empty(1, number, size))

    def forward(self, patches: Tensor, layout: Layout, prefix_layout: PrefixLayout | None, runner: Runner) -> Tensor:
        """See `ViTEmbeddings`."""
        return self.dropout(super().forward(patches, layout, prefix_layout, runner))

    def prefix(self) -> Tensor:
        """CLS and register tokens, `(1, num_prefix_tokens, D)`."""
        cls_token = super().prefix()
        return cls_token if self.register_tokens is None else torch.cat((cls_token, self.register_tokens), dim=1)


def dinov2_block(config: DINOv2Configs) -> Block:
    """One transformer block of the family."""
    return vit_block(config, mlp_by_ratio(config), layer_scale=True, drop_path=config.drop_path_rate, names={})


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
        prefix_layout = PrefixLayout.of(layout, self.num_prefix_tokens)
        tokens = self.embeddings(patches, layout, prefix_layout, runner)
        tokens = self.norm(runner.run(self.layers, tokens, prefix_layout.segments, None))
        return Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens))

    @staticmethod
    def count_prefix_tokens(config: DINOv2Configs) -> int:
        """The CLS token, and registers."""
        return 1 + (num_registers(config) or 0)

    @staticmethod
    def published_preprocessing(config: DINOv2Configs) -> Preprocessing:
        """The short side to 256 pixels and a crop of 224, whatever size the positions were learned on.

        TIPSv2's is a square of the trained size, without statistics.
        """
        if isinstance(config, TIPSv2PackingConfig):
            trained: Any = config.image_size
            plain: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
            return Preprocessing(rule="square", size=trained, resample="bilinear", **plain)
        statistics: dict[str, Any] = {"mean": tuple(IMAGENET_DEFAULT_MEAN), "std": tuple(IMAGENET_DEFAULT_STD)}
        return Preprocessing(rule="crop", size=224, short_side=256, resample="bicubic", **statistics)


class DINOv2WithRegistersPacking(DINOv2Packing):
    """DINOv2 with registers; what `DINOv2Packing` makes of such a config or checkpoint."""

    config_class = DINOv2WithRegistersPackingConfig


class TIPSv2Packing(DINOv2Packing):
    """TIPSv2's image encoder; what `DINOv2Packing` makes of such a config or checkpoint.

    Its register is the second CLS token of the original. The pooled vector is the first, as transformers' is.
    """

    config_class = TIPSv2PackingConfig
    dialects = TIPSV2_DIALECTS

"""Plain vision transformers (Dosovitskiy et al., arXiv:2010.11929), among them DINO (Caron et al., arXiv:2104.14294),
the encoder of MAE (He et al., arXiv:2111.06377), I-JEPA (Assran et al., arXiv:2301.08243) and Pixio (Yang et al.,
arXiv:2512.15715).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
)

from nopad.checkpoints.dialects.vit import PIXIO_DIALECTS
from nopad.encoder import PackedEncoder
from nopad.families.vit_blocks import vit_block, vit_mlp
from nopad.families.vit_checkpoints import (
    PUBLISHED,
    IJepaPackingConfig,
    PixioPackingConfig,
    ViTConfigs,
    ViTMAEPackingConfig,
    ViTPackingConfig,
    mlp_size,
    read_config,
)
from nopad.families.vit_embeddings import ViTEmbeddings
from nopad.inference.runner import Runner
from nopad.layers.block import Block
from nopad.layers.positions import sincos_2d
from nopad.layers.prefix import PrefixLayout
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing
from nopad.segments import Segments


class ViTPooler(nn.Module):
    """A linear layer and an activation over the CLS token."""

    def __init__(self, config: ViTPackingConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, cls_tokens: Tensor) -> Tensor:
        """`(S, D)` to `(S, D)`."""
        return self.activation(self.dense(cls_tokens))


def _block(config: ViTConfigs) -> Block:
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    drop_path = getattr(config, "drop_path_rate", 0.0)
    return vit_block(config, vit_mlp(config, mlp_size(config)), drop_path=drop_path, names=names)


class ViTPacking(PackedEncoder):
    """A plain vision transformer over packs; a clip's frames are separate segments, each with a CLS token of its own.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = ViTPackingConfig
    family = "vit"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    config_without_head = MappingProxyType({"with_pooler": False})
    names: Mapping[str, str] = {"norm": "layernorm", "head": "pooler"}

    def build(self) -> None:
        """Embeddings, blocks, norm, and where the checkpoint has it the pooler."""
        config = self.config
        self.embeddings = ViTEmbeddings(config, num_cls_tokens=self.num_prefix_tokens)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if getattr(config, "with_pooler", False):
            self.head = ViTPooler(config)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        number = self.num_prefix_tokens
        prefix_layout = PrefixLayout.of(layout, number) if number else None
        segments = layout.frames if prefix_layout is None else prefix_layout.segments
        tokens = self.embeddings(patches, layout, prefix_layout, runner)
        tokens = self.norm(runner.run(self.layers, tokens, segments, None))
        if prefix_layout is None:
            return Trunk(tokens)
        return Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens))

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`: the CLS token, through the pooler where there is one, else the mean."""
        if self.head is None or trunk.prefix_tokens is None:
            return super().pool_segments(trunk, segments)
        return self.head(trunk.prefix_tokens[:, 0])

    @staticmethod
    def count_prefix_tokens(config: ViTConfigs) -> int:
        """The CLS token, which I-JEPA does not have and of which Pixio has several."""
        if isinstance(config, PixioPackingConfig):
            return config.n_cls_tokens
        return 0 if isinstance(config, IJepaPackingConfig) else 1

    @staticmethod
    def published_preprocessing(config: ViTConfigs) -> Preprocessing:
        """A square of the trained size."""
        size: Any = config.image_size
        statistics: dict[str, Any] = {"mean": tuple(IMAGENET_STANDARD_MEAN), "std": tuple(IMAGENET_STANDARD_STD)}
        if not isinstance(config, ViTPackingConfig):
            statistics = {"mean": tuple(IMAGENET_DEFAULT_MEAN), "std": tuple(IMAGENET_DEFAULT_STD)}
        resample = "bicubic" if isinstance(config, PixioPackingConfig) else "bilinear"
        return Preprocessing(rule="square", size=size, resample=resample, **statistics)


class ViTMAEPacking(ViTPacking):
    """MAE's encoder over all patches, with fixed positions; what `ViTPacking` makes of such a config or checkpoint."""

    config_class = ViTMAEPackingConfig
    config_without_head = MappingProxyType({})

    def build(self) -> None:
        """As `ViTPacking`; positions are not trained."""
        super().build()
        self.embeddings.position_embeddings.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTEmbeddings):
            rows, columns = module.grid
            positions = sincos_2d(Layout.of_image(rows, columns, torch.device("cpu")), self.config.hidden_size)
            init.copy_(module.position_embeddings, F.pad(positions, (0, 0, 1, 0))[None])  # that of CLS is zero


class IJepaPacking(ViTPacking):
    """I-JEPA's encoder, without a CLS token; what `ViTPacking` makes of such a config or checkpoint."""

    config_class = IJepaPackingConfig
    config_without_head = MappingProxyType({})


class PixioPacking(ViTPacking):
    """Pixio, pooled as the mean of its CLS tokens; what `ViTPacking` makes of such a config or checkpoint."""

    config_class = PixioPackingConfig
    dialects = PIXIO_DIALECTS
    config_without_head = MappingProxyType({})

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`: the mean of its CLS tokens."""
        assert trunk.prefix_tokens is not None
        return trunk.prefix_tokens.mean(dim=1)

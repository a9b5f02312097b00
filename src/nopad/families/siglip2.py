"""SigLIP2 (Tschannen et al., arXiv:2502.14786) and SigLIP (Zhai et al., arXiv:2303.15343): NaFlex and fixed sizes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from nopad.checkpoint import Checkpoint, Dialect
from nopad.encoder import PackedEncoder, Trunk
from nopad.families.siglip2_checkpoints import (
    DIALECTS,
    PUBLISHED,
    Siglip2PackingConfig,
    SiglipConfigs,
    config_of,
    read_config,
    trained_grid,
)
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.mlp import MLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import ProbeHead
from nopad.layers.positions import is_strict, learned_positions, resampled_positions
from nopad.layout import Layout
from nopad.original import Original
from nopad.packing import patchify
from nopad.preprocessing import Preprocessing


def is_naflex(config: SiglipConfigs) -> bool:
    """Whether the model was trained on grids of any size."""
    return isinstance(config, Siglip2PackingConfig)


class Siglip2Embeddings(nn.Module):
    """Patches to tokens: a linear map, then learned positions."""

    def __init__(self, config: SiglipConfigs):
        super().__init__()
        self.trained_grid = trained_grid(config)
        self.naflex = is_naflex(config)
        self.strict = is_strict(config.positions)
        self.proj = PatchEmbedding(config.patch_size**2 * config.num_channels, config.hidden_size)  # pyright: ignore[reportOperatorIssue]
        self.position_embedding = nn.Parameter(torch.empty(math.prod(self.trained_grid), config.hidden_size))

    def forward(self, hidden_states: Tensor, layout: Layout) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        tokens = self.proj(hidden_states)
        return tokens + self.positions(layout, tokens.dtype).to(tokens.dtype)

    def positions(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        """`(T, D)`, in float32, or in `dtype` where that changes no bit.

        NaFlex as its `resize_positional_embeddings`, else as SigLIP's `interpolate_pos_encoding`.

        Raises:
            ValueError: `patch_positions` for NaFlex; see also `learned_positions`.
        """
        table = self.position_embedding
        if not self.naflex:
            rule = {"mode": "bicubic", "antialias": False, "strict": self.strict, "dtype": dtype}
            return learned_positions(layout, table, self.trained_grid, **rule)
        if layout.patch_positions is not None:
            raise ValueError(
                "patch_positions: expected None, NaFlex fits its positions to the whole grid of an image, which single "
                "patches do not tell; use a fixed-size checkpoint"
            )
        if not layout.grid:
            return table.float()[:0]
        return resampled_positions(layout, table, self.trained_grid, "bilinear", dtype=dtype)


def siglip2_mlp(config: SiglipConfigs) -> MLP:
    """The feed-forward layer of a block and of the head."""
    return MLP(config.hidden_size, config.intermediate_size, ACT2FN[config.hidden_act], bias=True)


def siglip2_block(config: SiglipConfigs) -> Block:
    """One transformer block of the family."""
    norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
    attention = PackedAttention(
        config.hidden_size,
        config.num_attention_heads,
        qkv_bias=True,
        proj_bias=True,
        dropout_p=config.attention_dropout,
    )
    return Block(norm(), attention, norm(), siglip2_mlp(config))


class Siglip2NaflexPacking(PackedEncoder):
    """SigLIP2 and SigLIP over packs; a clip's frames are separate segments.

    `pooled` is the vector that the image-text space compares; there is no projection after it.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = Siglip2PackingConfig
    family = "siglip2"
    dialects = DIALECTS
    published = PUBLISHED
    _no_split_modules = {"Block", "Siglip2Embeddings", "ProbeHead"}  # noqa: RUF012 - as transformers declares it

    def build(self) -> None:
        """Embeddings, blocks, norm, and where the checkpoint has it the head."""
        config = self.config
        if is_naflex(config) and is_strict(config.positions):
            raise ValueError("positions: NaFlex checkpoints resample theirs for every image, got 'strict'")
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_eps)
        self.embeddings = Siglip2Embeddings(config)
        self.layers = nn.ModuleList(siglip2_block(config) for _ in range(config.num_hidden_layers))
        self.norm = norm()
        self.head = None
        if config.vision_use_head:
            self.head = ProbeHead(config.hidden_size, config.num_attention_heads, norm(), siglip2_mlp(config))

    def trunk(self, hidden_states: Tensor, layout: Layout, states: list[Tensor] | None) -> Trunk:
        """Patches to normed tokens."""
        tokens = self.run_layers(self.embeddings(hidden_states, layout), layout.frames, None, states)
        return Trunk(self.norm(tokens), hidden_states=None if states is None else tuple(states))

    def example_positions(self) -> Tensor:
        """Learned positions on the trained grid."""
        layout = Layout.of_image(*self.embeddings.trained_grid, self.device)
        return self.embeddings.positions(layout, self.dtype)

    @property
    def default_preprocessing(self) -> Preprocessing:
        """NaFlex: at most 256 patches in the image's aspect ratio; fixed size: resized to the trained square."""
        statistics: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        if is_naflex(self.config):
            return Preprocessing(rule="naflex", resample="bilinear", **statistics)
        return Preprocessing(rule="square", size=self.config.image_size, resample="bicubic", **statistics)

    @classmethod
    def read_config(cls, checkpoint: Checkpoint, dialect: Dialect) -> SiglipConfigs:
        """The architecture, from config and tensors."""
        return read_config(checkpoint)

    @classmethod
    def published_config(cls, name: str) -> SiglipConfigs:
        """The config of a published model, of the kind that it is.

        Raises:
            ValueError: not a published name of this family.
        """
        super().published_config(name)  # raises for other names
        return config_of(cls.published[name])

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Siglip2Embeddings):
            init.normal_(module.position_embedding, std=self.config.hidden_size**-0.5)
        elif isinstance(module, ProbeHead):
            init.normal_(module.probe, std=self.config.hidden_size**-0.5)


class Siglip2Original(Original):
    """transformers' SigLIP2 for NaFlex, its SigLIP for fixed sizes, which on other grids interpolates its positions."""

    model_class = Siglip2VisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Siglip2VisionModel if is_naflex(packed.config) else SiglipVisionModel

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The original's config for the same architecture."""
        config: Any = super().config(packed)
        config.vision_use_head = packed.config.vision_use_head
        return config

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to what the original returns."""
        if isinstance(model, SiglipVisionModel):
            return model(pixel_values=pixels, interpolate_pos_encoding=True)
        patches, (images, rows, columns) = patchify(pixels, model.config.patch_size)
        return model(
            pixel_values=patches.unflatten(0, (images, -1)),
            pixel_attention_mask=torch.ones(images, rows * columns, dtype=torch.int32, device=pixels.device),
            spatial_shapes=torch.tensor([[rows, columns]] * images),
        )


Siglip2NaflexPacking.register_conversions()

"""MoonViT (Kimi Team, arXiv:2504.07491) as in Kimi K2.5, whose clips attend as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.constants import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from nopad.encoder import PackedEncoder
from nopad.families.moonvit_checkpoints import PUBLISHED, MoonViTPackingConfig, read_config
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.block import Block
from nopad.layers.mlp import MLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.position_table import LearnedPositions, table_positions
from nopad.layers.positions import sincos_axis
from nopad.layers.rope import apply_rotary, channel_frequencies, check_two_axes
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing

EPS = 1e-5
"""Epsilon of all norms, which no config has."""
MAX_PATCHES, MAX_SIDE = 16_384, 512
"""Patches of an image and of one side, in the published preprocessor configs."""


class MoonViTPositions(LearnedPositions, nn.Module):
    """Positions learned on one grid and resampled for each image; frames of a clip have sines and cosines as well."""

    def __init__(self, config: MoonViTPackingConfig):
        super().__init__()
        self.grid = config.pos_emb_height, config.pos_emb_width
        self.max_frames = config.pos_emb_time
        self.position_embeddings = nn.Parameter(torch.empty(*self.grid, config.hidden_size))

    def forward(self, layout: Layout) -> Tensor:
        """Positions of every patch, `(T, D)`, rounded to the dtype of the weights.

        Raises:
            ValueError: more frames than the model has positions for; see also `table_positions`.
        """
        layout.check_frames(self.max_frames)
        table = self.position_embeddings.flatten(0, 1)
        positions = table_positions(layout, table, self.grid, mode="bicubic", antialias=False, native=True)
        time = sincos_axis(layout.coordinates[:, 0], table.shape[1]).to(table.dtype)
        is_clip = layout.grid_thw[layout.image_index, :1] > 1
        return positions + time.masked_fill(~is_clip, 0.0)


class MoonViTEmbeddings(nn.Module):
    """Patches to tokens: a linear map, then positions."""

    def __init__(self, config: MoonViTPackingConfig):
        super().__init__()
        self.proj = PatchEmbedding(config.num_channels, config.hidden_size, config.patch_size, config.patch_order)
        self.pos_emb = MoonViTPositions(config)

    def forward(self, patches: Tensor, layout: Layout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        return runner.embed(self.proj, patches) + self.pos_emb(layout)


def moonvit_block(config: MoonViTPackingConfig) -> Block:
    """One transformer block of the family."""
    size = config.hidden_size
    norm = partial(nn.LayerNorm, size, eps=EPS)
    attention = PackedAttention(
        size,
        config.num_attention_heads,
        qkv_bias=True,
        proj_bias=True,
        dropout_p=0.0,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    )
    names = {"up": "fc1", "down": "fc2"}
    mlp = MLP(size, config.intermediate_size, ACT2FN[config.hidden_act], bias=True, names=names)
    return Block(norm(), attention, norm(), mlp, names={"attention": "attn"})


class MoonViTPacking(PackedEncoder):
    """MoonViT over packs; a whole clip is one segment.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`; also `patch_positions`, which this model cannot
            take, and clips of more frames than it has positions for.
    """

    config_class = MoonViTPackingConfig
    family = "moonvit"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    frames_attend_jointly = True
    names: Mapping[str, str] = {"embeddings": "patch_embed", "norm": "final_layernorm"}

    def build(self) -> None:
        """Embeddings, blocks and norm."""
        config = self.config
        check_two_axes(self._head_dim)
        self.embeddings = MoonViTEmbeddings(config)
        self.layers = nn.ModuleList(moonvit_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=EPS)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens."""
        tokens = self.embeddings(patches, layout, runner)
        return Trunk(self.norm(runner.run(self.layers, tokens, layout.images, self.rope(layout))))

    def rope(self, layout: Layout) -> Rope:
        """Rotary embedding: each frequency for the column, then for the row."""
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = channel_frequencies((self._head_dim // 4,), theta, layout.coordinates.device)
        columns_rows = layout.coordinates[:, [2, 1]].float()
        angles = (columns_rows[:, None, :] * frequencies[:, None]).flatten(1)[:, None]
        return Rope(apply_rotary, angles.cos(), angles.sin())

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of `rows` patches in a row."""
        return self.rope(Layout.of_image(1, rows, self.device))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoonViTPositions):
            init.trunc_normal_(module.position_embeddings)

    @staticmethod
    def published_preprocessing(config: MoonViTPackingConfig) -> Preprocessing:
        """As they are, within limits of patches, with black pixels up to whole blocks of those that are merged."""
        statistics: dict[str, Any] = {"mean": tuple(IMAGENET_STANDARD_MEAN), "std": tuple(IMAGENET_STANDARD_STD)}
        multiple, size = config.merge_kernel_size[0], (MAX_PATCHES, MAX_SIDE)
        return Preprocessing(rule="navit", size=size, multiple_of=multiple, resample="bicubic", **statistics)

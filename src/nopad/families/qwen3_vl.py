"""The vision encoders of Qwen3-VL (Bai et al., arXiv:2511.21631) and Qwen3.5, whose tokens a language model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from nopad.checkpoints.formats import grid_side
from nopad.families.qwen3_vl_checkpoints import (
    PUBLISHED,
    Qwen3_5PackingConfig,
    Qwen3VLConfigs,
    Qwen3VLPackingConfig,
    read_config,
)
from nopad.families.qwen_vl import QwenVLEmbeddings, QwenVLEncoder
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.merger import PatchMerger
from nopad.layers.mlp import MLP
from nopad.layers.position_table import PositionTable
from nopad.layers.positions import is_strict
from nopad.layers.rope import check_two_axes
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing

MIN_PIXELS, MAX_PIXELS = 65_536, 16_777_216
"""Pixels of an image, in the published preprocessor configs."""


def qwen3_vl_block(config: Qwen3VLConfigs) -> Block:
    """One transformer block of the family."""
    size = config.hidden_size
    norm = partial(nn.LayerNorm, size, eps=1e-6)
    attention = PackedAttention(
        size, config.num_heads, qkv_bias=True, proj_bias=True, dropout_p=0.0, one_qkv=True, names={}
    )
    names = {"up": "linear_fc1", "down": "linear_fc2"}
    mlp = MLP(size, config.intermediate_size, ACT2FN[config.hidden_act], bias=True, names=names)
    return Block(norm(), attention, norm(), mlp, names={"attention": "attn"})


class Qwen3VLPacking(QwenVLEncoder):
    """Qwen3-VL's and Qwen3.5's vision encoder over packs; a clip's frames, two by two, are separate segments.

    A patch is of two frames; in an image of the same one twice. Rows and columns are even, since 2 × 2 tokens are
    merged. Tokens are not normed, and row by row; transformers' model has them block by block, as `nopad.merge`.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`; also `patch_positions`, which this model cannot
            take, and odd rows or columns.
    """

    config_class = Qwen3VLPackingConfig
    family = "qwen3_vl"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    names: Mapping[str, str] = {**QwenVLEncoder.names, "position_embedding": "pos_embed"}

    def build(self) -> None:
        """Embeddings, positions, blocks and mergers."""
        config = self.config
        size, merge_size = config.hidden_size, config.spatial_merge_size
        if is_strict(config.positions):
            raise ValueError("positions: these checkpoints resample theirs for every image, got 'strict'")
        check_two_axes(self._head_dim)
        side = grid_side(config.num_position_embeddings, "num_position_embeddings")
        self.embeddings = QwenVLEmbeddings(config, size, bias=True)
        options = {"mode": "bilinear", "antialias": False, "align_corners": True, "native": True}
        self.position_embedding = PositionTable((side, side), size, **options)
        self.layers = nn.ModuleList(qwen3_vl_block(config) for _ in range(config.depth))
        self.merger = PatchMerger(size, merge_size, config.out_hidden_size, norm_blocks=False)
        indexes = getattr(config, "deepstack_visual_indexes", ())
        self.deepstack_layers = tuple(sorted(layer for layer in indexes if layer < config.depth))
        if indexes:
            merger = partial(PatchMerger, size, merge_size, config.out_hidden_size, norm_blocks=True)
            self.deepstack_merger_list = nn.ModuleList(merger() for _ in indexes)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens.

        Raises:
            ValueError: `patch_positions`, or rows or columns that the mergers do not divide.
        """
        if layout.patch_positions is not None:
            raise ValueError(
                "patch_positions: Qwen3-VL resamples its positions to the whole grid of an image, which "
                "patch_positions do not contain; give whole images or clips and their (t, h, w) in grid_thw"
            )
        layout.check_multiple(self.merge_size)
        tokens = self.embeddings(patches, runner) + self.position_embedding(layout)
        return Trunk(runner.run(self.layers, tokens, layout.frames, self.rope(layout.coordinates)))

    def example_positions(self) -> Tensor:
        """Positions on the trained grid."""
        return self.position_embedding(Layout.of_image(*self.position_embedding.grid, self.device))

    @property
    def deepstack_mergers(self) -> Sequence[nn.Module]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The merger of each of `deepstack_layers`; the list has them in the order of the config."""
        indexes: list[int] = [*getattr(self.config, "deepstack_visual_indexes", ())]
        return [self.deepstack_merger_list[indexes.index(layer)] for layer in self.deepstack_layers]

    @staticmethod
    def published_preprocessing(config: Qwen3VLConfigs) -> Preprocessing:
        """Both sides rounded to whole blocks of patches, within limits of pixels."""
        statistics: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
        multiple, size = config.spatial_merge_size, (MIN_PIXELS, MAX_PIXELS)
        return Preprocessing(rule="smart_resize", size=size, multiple_of=multiple, resample="bicubic", **statistics)


class Qwen3_5Packing(Qwen3VLPacking):  # noqa: N801 - transformers' own name
    """Qwen3.5's, without DeepStack; what `Qwen3VLPacking` makes of such a config or checkpoint."""

    config_class = Qwen3_5PackingConfig

"""The vision encoders of Qwen2-VL (Wang et al., arXiv:2409.12191) and Qwen2.5-VL (Bai et al., arXiv:2502.13923)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.families.qwen2_vl_checkpoints import (
    PUBLISHED,
    Qwen2_5_VLPackingConfig,
    Qwen2VLConfigs,
    Qwen2VLPackingConfig,
    read_config,
    window_side,
)
from nopad.families.qwen_vl import QwenVLEmbeddings, QwenVLEncoder
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block
from nopad.layers.merger import PatchMerger
from nopad.layers.mlp import MLP, GatedMLP
from nopad.layers.rope import check_two_axes
from nopad.layers.windows import WindowLayout, windows_of_one_segment
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing
from nopad.segments import Segments

EPS = 1e-6
"""Epsilon of all norms, which no config has."""
MIN_PIXELS, MAX_PIXELS = 3_136, 12_845_056
"""Pixels of an image, in the published preprocessor configs."""
MERGER_NAMES = {"norm": "ln_q", "linear_fc1": "mlp.0", "linear_fc2": "mlp.2"}


def qwen2_vl_block(config: Qwen2VLConfigs, index: int) -> Block:
    """A transformer block: Qwen2.5-VL's have RMSNorm, gated feed-forward layers, and windows but for a few."""
    mlp: MLP | GatedMLP
    activation, windowed = ACT2FN[config.hidden_act], False
    if isinstance(config, Qwen2_5_VLPackingConfig):
        size, norm_class = config.hidden_size, nn.RMSNorm
        windowed = index not in config.fullatt_block_indexes
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        mlp = GatedMLP(size, config.intermediate_size, activation, bias=True, names=names)
    else:
        size, norm_class = config.embed_dim, nn.LayerNorm
        mlp = MLP(size, size * config.mlp_ratio, activation, bias=True, names={"up": "fc1", "down": "fc2"})
    options: dict[str, Any] = {"qkv_bias": True, "proj_bias": True, "dropout_p": 0.0, "names": {}}
    attention = PackedAttention(size, config.num_heads, one_qkv=True, windowed=windowed, **options)
    norm1, norm2 = (norm_class(size, eps=EPS) for _ in range(2))
    return Block(norm1, attention, norm2, mlp, names={"attention": "attn"})


class Qwen2VLPacking(QwenVLEncoder):
    """Qwen2-VL's and Qwen2.5-VL's vision encoder over packs; a clip's frames, two by two, are separate segments.

    A patch is of two frames; in an image of the same one twice. Rows and columns are even, since 2 × 2 tokens are
    merged. Tokens are not normed, and row by row; transformers' models have them block by block, or window by window.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`; also `patch_positions`, which this model cannot
            take, and odd rows or columns.
    """

    config_class = Qwen2VLPackingConfig
    family = "qwen2_vl"
    published = PUBLISHED
    read_config = staticmethod(read_config)

    def build(self) -> None:
        """Embeddings, blocks and merger."""
        config, is_2_5 = self.config, isinstance(self.config, Qwen2_5_VLPackingConfig)
        check_two_axes(self._head_dim)
        self.embeddings = QwenVLEmbeddings(config, self.hidden_size, bias=False)
        self.layers = nn.ModuleList(qwen2_vl_block(config, index) for index in range(config.depth))
        out_size = config.out_hidden_size if is_2_5 else config.hidden_size  # of the language model
        options: dict[str, Any] = {"norm_class": nn.RMSNorm if is_2_5 else nn.LayerNorm, "names": MERGER_NAMES}
        self.merger = PatchMerger(self.hidden_size, self.merge_size, out_size, **options)

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens."""
        check_layout(layout, self.merge_size)
        tokens = self.embeddings(patches, runner)
        return Trunk(runner.run(self.layers, tokens, layout.frames, self.rope(layout.coordinates)))

    @staticmethod
    def published_preprocessing(config: Qwen2VLConfigs) -> Preprocessing:
        """Both sides rounded to whole blocks of patches, within limits of pixels."""
        statistics: dict[str, Any] = {"mean": tuple(OPENAI_CLIP_MEAN), "std": tuple(OPENAI_CLIP_STD)}
        multiple, size = config.spatial_merge_size, (MIN_PIXELS, MAX_PIXELS)
        return Preprocessing(rule="smart_resize", size=size, multiple_of=multiple, resample="bicubic", **statistics)


class Qwen2_5_VLPacking(Qwen2VLPacking):  # noqa: N801 - transformers' own name
    """Qwen2.5-VL's, most of whose layers attend within windows; what `Qwen2VLPacking` makes of such a checkpoint.

    In the layers the rows of a frame are window by window.
    """

    config_class = Qwen2_5_VLPackingConfig

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens."""
        check_layout(layout, self.merge_size)
        windows = windows_of(self.config, layout)
        tokens = windows.to_rows(self.embeddings(patches, runner))
        rope = self.rope(windows.to_rows(layout.coordinates))
        return Trunk(windows.to_patches(runner.run(self.layers, tokens, windows.segments, rope)))

    def patch_rows(self, layout: Layout) -> Tensor:
        """See `PackedEncoder`."""
        return windows_of(self.config, layout).patches

    def example_segments(self, length: int) -> Segments:
        """See `PackedEncoder`."""
        return windows_of_one_segment(length, window_side(self.config), self.merge_size, self.device)


def windows_of(config: Qwen2_5_VLPackingConfig, layout: Layout) -> WindowLayout:
    """The windows of every frame."""
    return WindowLayout.of(layout, window_side(config), config.spatial_merge_size)


def check_layout(layout: Layout, merge_size: int) -> None:
    """Raise `ValueError` unless frames are whole grids of blocks."""
    if layout.patch_positions is not None:
        raise ValueError(
            "patch_positions: Qwen2-VL and Qwen2.5-VL merge blocks of the whole grid of an image, of which some may be "
            "missing in patch_positions; give whole images or clips and their (t, h, w) in grid_thw"
        )
    layout.check_multiple(merge_size)

"""Pixtral (Agrawal et al., arXiv:2410.07073), the encoder of Mistral 3: RMSNorm, gated feed-forward layers, rope."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.encoder import PackedEncoder
from nopad.families.pixtral_checkpoints import PUBLISHED, PixtralPackingConfig, read_config
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.block import Block
from nopad.layers.mlp import GatedMLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.rope import apply_rotary, channel_frequencies, check_two_axes
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing

EPS = 1e-5
"""Epsilon of all norms, which no config has."""
ATTENTION_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}
MLP_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
BLOCK_NAMES = {"norm1": "attention_norm", "norm2": "ffn_norm", "mlp": "feed_forward"}


class PixtralEmbeddings(PatchEmbedding):
    """Patches to tokens: one layer at the top of the original's names, whose GEMM it is itself."""

    @property
    def proj(self) -> PatchEmbedding:
        """The GEMM of the patches."""
        return self


def pixtral_block(config: PixtralPackingConfig) -> Block:
    """One transformer block of the family."""
    size = config.hidden_size
    norm = partial(nn.RMSNorm, size, eps=EPS)
    attention = PackedAttention(
        size,
        config.num_attention_heads,
        qkv_bias=False,
        proj_bias=False,
        dropout_p=config.attention_dropout,
        names=ATTENTION_NAMES,
    )
    mlp = GatedMLP(size, config.intermediate_size, ACT2FN[config.hidden_act], bias=False, names=MLP_NAMES)
    return Block(norm(), attention, norm(), mlp, names=BLOCK_NAMES)


class PixtralPacking(PackedEncoder):
    """Pixtral's encoder over packs; a clip's frames are separate segments. Tokens are not normed.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = PixtralPackingConfig
    family = "pixtral"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    names: Mapping[str, str] = {"embeddings": "patch_conv", "layers": "transformer.layers"}
    norm = None

    def build(self) -> None:
        """Embeddings, the norm behind them, and blocks."""
        config = self.config
        check_two_axes(self._head_dim)
        size = config.hidden_size
        self.embeddings = PixtralEmbeddings(
            config.num_channels, size, config.patch_size, config.patch_order, bias=False
        )
        self.transformer = nn.Module()
        self.layers = nn.ModuleList(pixtral_block(config) for _ in range(config.num_hidden_layers))
        self.ln_pre = nn.RMSNorm(size, eps=EPS)  # registered last: transformers leaves the last child unquantised

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens."""
        tokens = runner.embed(self.embeddings.proj, patches)
        tokens = self.ln_pre(tokens.to(self.ln_pre.weight.dtype))  # under autocast the residual sum is float32
        return Trunk(runner.run(self.layers, tokens, layout.frames, self.rope(layout)))

    def rope(self, layout: Layout) -> Rope:
        """Rotary embedding: of one series of frequencies rows have every second, columns those between."""
        theta = self.config.rope_parameters["rope_theta"]
        frequencies = channel_frequencies((self._head_dim // 2,), theta, layout.coordinates.device)
        rows, columns = layout.coordinates[:, 1:, None].float().unbind(1)
        angles = torch.cat((rows * frequencies[::2], columns * frequencies[1::2]), dim=1)[:, None]
        return Rope(apply_rotary, angles.cos(), angles.sin())

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of `rows` patches in a row."""
        return self.rope(Layout.of_image(1, rows, self.device))

    @staticmethod
    def published_preprocessing(config: PixtralPackingConfig) -> Preprocessing:
        """The long side at most that of the config, both sides rounded up to whole patches."""
        statistics: dict[str, Any] = {"mean": tuple(OPENAI_CLIP_MEAN), "std": tuple(OPENAI_CLIP_STD)}
        size: Any = config.image_size
        multiple = config.image_multiple
        return Preprocessing(rule="longest_edge", size=size, multiple_of=multiple, resample="bicubic", **statistics)

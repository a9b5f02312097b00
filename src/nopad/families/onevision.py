"""OneVision-Encoder and its preview v0: a pre-LayerNorm transformer whose tokens attend over whole clips."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from nopad.encoder import PackedEncoder
from nopad.families.clip_blocks import clip_block, clip_mlp
from nopad.families.onevision_checkpoints import PUBLISHED, OneVisionPackingConfig, read_config
from nopad.inference.runner import Runner
from nopad.layers.attention import Rope
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import MAPHead
from nopad.layers.roles import RoleAliases
from nopad.layers.rope_3d import check_head_dim, rope_3d
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing

_NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


def onevision_norm(config: OneVisionPackingConfig) -> nn.Module:
    """A norm of the trunk.

    Raises:
        ValueError: unknown `layer_norm_type`.
    """
    if config.layer_norm_type not in _NORMS:
        raise ValueError(f"layer_norm_type: expected one of {', '.join(_NORMS)}, got {config.layer_norm_type!r}")
    return _NORMS[config.layer_norm_type](config.hidden_size, eps=config.layer_norm_eps)


class OneVisionEmbeddings(RoleAliases):
    """Patches to tokens: a linear map without bias; positions come with the attention."""

    names: Mapping[str, str] = {"proj": "patch_embedding"}

    def __init__(self, config: OneVisionPackingConfig):
        super().__init__()
        size, order = config.patch_size, config.patch_order
        self.proj = PatchEmbedding(config.num_channels, config.hidden_size, size, order, bias=False)

    def forward(self, patches: Tensor, runner: Runner) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        return runner.embed(self.proj, patches)


class OneVisionEncoderPacking(PackedEncoder):
    """OneVision-Encoder over packs; a whole clip is one segment.

    Frames are numbered 0, 1, 2, …; `patch_positions` gives them other numbers (training spreads a clip's frames over
    0 … 63) and lets a clip keep only some of its patches.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`.
    """

    config_class = OneVisionPackingConfig
    family = "onevision"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    frames_attend_jointly = True
    config_without_head = "has its final norm only with the head, and its tokens are normed"
    names: Mapping[str, str] = {"layers": "encoder.layers", "norm": "layernorm_post"}

    def build(self) -> None:
        """Embeddings, blocks, and where the checkpoint has them the final norm and the head, which come together."""
        config = self.config
        check_head_dim(self._head_dim)
        self.embeddings = OneVisionEmbeddings(config)
        self.layernorm_pre = onevision_norm(config)
        self.encoder = nn.Module()
        self.layers = nn.ModuleList(
            clip_block(config, partial(onevision_norm, config)) for _ in range(config.num_hidden_layers)
        )
        self.norm = None
        if config.use_head:
            self.norm = onevision_norm(config)
            norm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.head = MAPHead(config.hidden_size, config.num_attention_heads, norm, clip_mlp(config), names={})

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens, normed where the checkpoint has the final norm."""
        tokens = self.layernorm_pre(self.embeddings(patches, runner))
        tokens = runner.run(self.layers, tokens, layout.images, self.rope(layout))
        return Trunk(tokens if self.norm is None else self.norm(tokens))

    def rope(self, layout: Layout) -> Rope:
        """Rotary embedding over time, row and column."""
        return rope_3d(layout, self._head_dim, self.config.rope_theta)

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of `rows` patches in a row."""
        return self.rope(Layout.of_image(1, rows, self.device))

    @staticmethod
    def published_preprocessing(config: OneVisionPackingConfig) -> Preprocessing:
        """CLIP's resize and crop."""
        statistics: dict[str, Any] = {"mean": tuple(OPENAI_CLIP_MEAN), "std": tuple(OPENAI_CLIP_STD)}
        return Preprocessing(rule="crop", size=config.image_size, resample="bicubic", **statistics)

"""DINOv3 (Siméoni et al., arXiv:2508.10104): a vision transformer with CLS and register tokens and axial rope."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from nopad.encoder import PackedEncoder
from nopad.families.dinov3_checkpoints import PUBLISHED, DINOv3ViTPackingConfig, read_config
from nopad.inference.runner import Runner
from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.block import Block
from nopad.layers.mlp import MLP, GatedMLP
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layers.rope import apply_rotary, axial_angles, check_two_axes, patch_centres, rope_periods, stored_periods
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing

logger = logging.getLogger(__name__)

STATISTICS: dict[str, dict[str, Any]] = {
    "imagenet": {"mean": tuple(IMAGENET_DEFAULT_MEAN), "std": tuple(IMAGENET_DEFAULT_STD)},
    "sat493m": {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)},
}
"""Mean and standard deviation of each colour, by `config.pixel_statistics`."""


@lru_cache
def _log_statistics(source: str | None) -> None:
    logger.warning(
        "checkpoint %r: nothing says which pixel statistics it was trained with; images get ImageNet's. For satellite "
        "images (SAT-493M) put the model's preprocessor_config.json beside it, or give from_pretrained "
        "pixel_statistics='sat493m'",
        source,
    )


class DINOv3Embeddings(RoleAliases):
    """Patches to tokens, and each segment's CLS and register tokens in front of them."""

    names: Mapping[str, str] = {"proj": "patch_embeddings"}

    def __init__(self, config: DINOv3ViTPackingConfig):
        super().__init__()
        size = config.hidden_size
        patch_size: int = config.patch_size  # pyright: ignore[reportAssignmentType] - a number in every checkpoint
        self.proj = PatchEmbedding(config.num_channels, size, patch_size, config.patch_order)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, size))
        # For masked training alone; kept so that a saved checkpoint is complete.
        self.mask_token = nn.Parameter(torch.empty(1, 1, size))

    def forward(self, patches: Tensor, prefix_layout: PrefixLayout, runner: Runner) -> Tensor:
        """`(T, P)` to `(T + S · num_prefix_tokens, D)`."""
        tokens = runner.embed(self.proj, patches)
        prefix = torch.cat((self.cls_token, self.register_tokens), dim=1)
        return prefix_layout.join(tokens, prefix.expand(prefix_layout.segments.num_segments, -1, -1))


class DINOv3Rope(nn.Module):
    """Rotary embedding of each patch by the position of its centre in the image; prefix tokens are not rotated.

    In training the coordinates are shifted, stretched and rescaled at random by the config, each image and frame
    separately (transformers' `augment_patches_center_coordinates`).
    """

    def __init__(self, config: DINOv3ViTPackingConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        check_two_axes(self.head_dim)
        self.base = config.rope_theta
        self.periods = None if config.rope_periods is None else tuple(config.rope_periods)
        num_periods = self.head_dim // 4
        for period in self.periods or ():
            if type(period) not in (int, float) or not 0 < period < math.inf:
                raise ValueError(f"rope_periods: expected numbers above 0, got {config.rope_periods!r:.80}")
        if self.periods is not None and len(self.periods) != num_periods:
            raise ValueError(f"rope_periods: expected {num_periods} numbers, got {len(self.periods)}")
        self.shift = config.pos_embed_shift
        self.jitter = config.pos_embed_jitter
        self.rescale = config.pos_embed_rescale

    def forward(self, layout: Layout, prefix_layout: PrefixLayout) -> Rope:
        """Rotary embedding of every row of the pack."""
        centres = patch_centres(layout)
        if self.training:
            centres = self.augment(centres, layout)
        # Prefix tokens get a centre of zero, so an angle of zero: exactly no rotation.
        centres = prefix_layout.join(centres, centres.new_zeros(*prefix_layout.prefix.shape, 2))
        angles = axial_angles(centres, self.periods_on(layout.device))[:, None]
        return Rope(apply_rotary, angles.cos(), angles.sin())

    def periods_on(self, device: torch.device) -> Tensor:
        """`(K / 4,)` float32."""
        if self.periods is not None:
            return stored_periods(self.periods, device)
        return rope_periods(self.head_dim, self.base, device)

    def augment(self, centres: Tensor, layout: Layout) -> Tensor:
        """`(T, 2)` to `(T, 2)`."""

        def draw(limit: float, axes: int) -> Tensor:
            return centres.new_empty(len(layout.frames), axes).uniform_(-limit, limit)[layout.frame_index]

        if self.shift is not None:
            centres = centres + draw(self.shift, axes=2)
        if self.jitter is not None:
            centres = centres * draw(math.log(self.jitter), axes=2).exp()
        if self.rescale is not None:
            centres = centres * draw(math.log(self.rescale), axes=1).exp()
        return centres


def dinov3_block(config: DINOv3ViTPackingConfig) -> Block:
    """One transformer block of the family."""
    size = config.hidden_size
    norm = partial(nn.LayerNorm, size, eps=config.layer_norm_eps)
    attention = PackedAttention(
        size,
        config.num_attention_heads,
        qkv_bias=(config.query_bias, config.key_bias, config.value_bias),
        proj_bias=config.proj_bias,
        dropout_p=config.attention_dropout,
        names={"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"},
    )
    feed_forward = GatedMLP if config.use_gated_mlp else MLP
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    activation = ACT2FN[config.hidden_act]
    mlp = feed_forward(size, config.intermediate_size, activation, bias=config.mlp_bias, names=names)
    return Block(norm(), attention, norm(), mlp, layer_scale=True, drop_path=config.drop_path_rate, names={})


class DINOv3ViTPacking(PackedEncoder):
    """DINOv3 over packs; a clip's frames are separate segments, each with CLS and register tokens of its own.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`; also `patch_positions`, which this model cannot
            take.
    """

    config_class = DINOv3ViTPackingConfig
    family = "dinov3"
    published = PUBLISHED
    read_config = staticmethod(read_config)
    names: Mapping[str, str] = {"layers": "model.layer"}

    def build(self) -> None:
        """Embeddings, rope, blocks and norms."""
        config = self.config
        if config.pixel_statistics not in (None, *STATISTICS):
            raise ValueError(f"pixel_statistics: expected {' or '.join(STATISTICS)}, got {config.pixel_statistics!r}")
        self.embeddings = DINOv3Embeddings(config)
        self.rope = DINOv3Rope(config)
        self.model = nn.Module()
        self.layers = nn.ModuleList(dinov3_block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        untied = config.untie_cls_norm
        self.cls_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if untied else None

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to normed tokens.

        Raises:
            ValueError: `patch_positions`.
        """
        if layout.patch_positions is not None:
            raise ValueError(
                "patch_positions: DINOv3's rope places a patch within the rows and columns of its image, which "
                "patch_positions do not contain; give whole images or frames and their (t, h, w) in grid_thw"
            )
        prefix_layout = PrefixLayout.of(layout, self.num_prefix_tokens)
        tokens = self.embeddings(patches, prefix_layout, runner)
        tokens = runner.run(self.layers, tokens, prefix_layout.segments, self.rope(layout, prefix_layout))
        return self.norm_trunk(Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens)))

    def norm_trunk(self, trunk: Trunk) -> Trunk:
        """The final norm, and that of CLS and register tokens where it is another."""
        norm_prefix = self.norm if self.cls_norm is None else self.cls_norm
        return Trunk(self.norm(trunk.tokens), norm_prefix(trunk.prefix_tokens))

    def example_rope(self, rows: int) -> Rope:
        """Rotary embedding of one row of patches and its prefix tokens."""
        layout = Layout.of_image(1, rows - self.num_prefix_tokens, self.device)
        return self.rope(layout, PrefixLayout.of(layout, self.num_prefix_tokens))

    @staticmethod
    def count_prefix_tokens(config: DINOv3ViTPackingConfig) -> int:
        """The CLS token, and registers."""
        return 1 + config.num_register_tokens

    @staticmethod
    def published_preprocessing(config: DINOv3ViTPackingConfig) -> Preprocessing:
        """A square of 224 pixels; the original resizes it in float."""
        statistics = STATISTICS[config.pixel_statistics or "imagenet"]
        return Preprocessing(rule="square", size=224, resample="bilinear", rescale_before_resize=True, **statistics)

    @classmethod
    def read_preprocessing(
        cls, config: DINOv3ViTPackingConfig, preprocessor_config: Mapping[str, Any] | None, source: str | None
    ) -> Preprocessing:
        """See `PackedEncoder.read_preprocessing`; logs that the pixel statistics are unknown, where they are."""
        if config.pixel_statistics is None and "image_mean" not in (preprocessor_config or {}):
            _log_statistics(source)
        return super().read_preprocessing(config, preprocessor_config, source)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See `PackedEncoder.save_pretrained`; warns of rope periods that transformers' model does not read."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.config.rope_periods is not None:
            logger.warning(
                "%s: the rope periods of this checkpoint are not exactly the powers of %g; nopad reads them from "
                "rope_periods in config.json, transformers' DINOv3ViTModel computes with those powers",
                save_directory,
                self.config.rope_theta,
            )

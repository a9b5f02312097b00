"""C-RADIO (Heinrich et al., arXiv:2412.07679; Ranzinger et al., arXiv:2601.17237), versions 3 and 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from nopad.encoder import PackedEncoder
from nopad.families.radio_checkpoints import PUBLISHED, RadioPackingConfig, check_config, read_config
from nopad.families.vit_blocks import mlp_by_ratio, vit_block
from nopad.inference.runner import Runner
from nopad.layers.dtypes import at_least_float32
from nopad.layers.patch_embed import reorder_patches
from nopad.layers.position_table import LearnedPositions, table_positions
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.outputs import Trunk
from nopad.preprocessing.rules import Preprocessing
from nopad.segments import Segments


class RadioConditioner(nn.Module):
    """Normalises pixels from 0 to 1; its statistics stay in float32, which the original rounds to half precision."""

    def __init__(self, config: RadioPackingConfig):
        super().__init__()
        self.channels = config.num_channels
        self.norm_mean = nn.Buffer(torch.empty(self.channels, 1, 1, dtype=torch.float32))
        self.norm_std = nn.Buffer(torch.empty(self.channels, 1, 1, dtype=torch.float32))

    def forward(self, patches: Tensor) -> Tensor:
        """`(T, P)` patches, channel by channel, to the same."""
        pixels = at_least_float32(patches).unflatten(1, (self.channels, -1))
        return ((pixels - self.norm_mean.flatten(1)) / self.norm_std.flatten(1)).flatten(1).to(patches.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != before[name].dtype:
                setattr(self, name, before[name].to(buffer.device))
        return self


class RadioEmbeddings(LearnedPositions, RoleAliases):
    """Patches to tokens with learned positions, and each segment's CLS and register tokens in front of them.

    Positions are resized to the square of the image's longer side and cropped.
    """

    names: Mapping[str, str] = {"proj": "patch_projection"}

    def __init__(self, config: RadioPackingConfig):
        super().__init__()
        size = config.hidden_size
        self.proj = nn.Linear(config.num_channels * config.patch_size**2, size, bias=False)
        side = config.max_img_size // config.patch_size
        self.grid = side, side
        self.align_corners = config.positions_align_corners
        self.position_embedding = nn.Parameter(torch.empty(1, side**2, size))
        self.cls_register_token = nn.Parameter(torch.empty(config.num_cls_tokens + config.num_registers, size))

    def forward(self, patches: Tensor, layout: Layout, prefix_layout: PrefixLayout, runner: Runner) -> Tensor:
        """`(T, P)`, channel by channel, to `(T + S · num_prefix_tokens, D)`."""
        tokens = runner.embed(self.proj, patches) + self.positions(layout)
        return prefix_layout.join(tokens, self.cls_register_token.expand(prefix_layout.segments.num_segments, -1, -1))

    def positions(self, layout: Layout) -> Tensor:
        """`(T, D)` positions of the patches, rounded to the dtype of the weights.

        Raises:
            ValueError: see `table_positions`.
        """
        options: dict[str, Any] = {"antialias": False, "align_corners": self.align_corners, "crop": True}
        return table_positions(layout, self.position_embedding[0], self.grid, mode="bilinear", native=True, **options)


class RadioPacking(PackedEncoder):
    """C-RADIO over packs; a clip's frames are separate segments, each with CLS and register tokens of its own.

    Pixels are from 0 to 1, and normalised in the model. `pooled` is the summary of the original: the CLS tokens of
    `summary_idxs` one behind the other, `(N, len(summary_idxs) · D)`. Neither it nor the tokens are normed.

    Raises:
        ValueError: see `PackedEncoder.forward` and `from_pretrained`; also `patch_positions`, which this model cannot
            take.
    """

    config_class = RadioPackingConfig
    family = "radio"
    can_be_quantised = False
    published = PUBLISHED
    read_config = staticmethod(read_config)
    names: Mapping[str, str] = {"layers": "encoder.layer"}
    norm = None
    _keep_in_fp32_modules_strict = {"input_conditioner"}  # noqa: RUF012 - as transformers has it

    def build(self) -> None:
        """Statistics of the pixels, embeddings and blocks."""
        config = self.config
        check_config(config)
        self.input_conditioner = RadioConditioner(config) if config.normalize_pixels else None
        self.embeddings = RadioEmbeddings(config)
        self.encoder = nn.Module()
        options: dict[str, Any] = {"layer_scale": config.use_layer_scale, "drop_path": config.drop_path_rate}
        self.layers = nn.ModuleList(
            vit_block(config, mlp_by_ratio(config), names={}, **options) for _ in range(config.num_hidden_layers)
        )
        self.summary_idxs = nn.Buffer(torch.tensor(config.summary_idxs))

    def trunk(self, patches: Tensor, layout: Layout, runner: Runner) -> Trunk:
        """Patches to tokens."""
        prefix_layout = PrefixLayout.of(layout, self.num_prefix_tokens)
        patches = reorder_patches(patches, self.patch_size, self.patch_order, "chw")  # which the linear map takes
        if self.input_conditioner is not None:
            patches = self.input_conditioner(patches)
        tokens = self.embeddings(patches, layout, prefix_layout, runner)
        tokens = runner.run(self.layers, tokens, prefix_layout.segments, None)
        return Trunk(prefix_layout.take_patches(tokens), prefix_layout.take_prefix(tokens))

    def pool_segments(self, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, len(summary_idxs) · D)`: some CLS tokens, one behind the other."""
        tokens = trunk.prefix_tokens
        assert tokens is not None
        return tokens.index_select(1, self.summary_idxs.to(tokens.device)).flatten(1)

    @property
    def pooled_size(self) -> int:
        """Values of `pooled`."""
        return len(self.config.summary_idxs) * self.hidden_size

    @staticmethod
    def count_prefix_tokens(config: RadioPackingConfig) -> int:
        """CLS and register tokens."""
        return config.num_cls_tokens + config.num_registers

    @staticmethod
    def published_preprocessing(config: RadioPackingConfig) -> Preprocessing:
        """As they are; normalised where the model does not do that."""
        statistics: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        if not config.normalize_pixels:
            statistics = {"mean": tuple(config.norm_mean), "std": tuple(config.norm_std)}
        return Preprocessing(rule="native", resample="bicubic", **statistics)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RadioConditioner):
            init.copy_(module.norm_mean, torch.tensor(self.config.norm_mean).view(-1, 1, 1))
            init.copy_(module.norm_std, torch.tensor(self.config.norm_std).view(-1, 1, 1))
        elif module is self:
            init.copy_(self.summary_idxs, torch.tensor(self.config.summary_idxs))

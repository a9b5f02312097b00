"""Embeddings of plain vision transformers, which DINOv2 has too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nopad.checkpoints.formats import trained_grid
from nopad.inference.runner import Runner
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.position_table import LearnedPositions, table_positions
from nopad.layers.positions import check_mode, is_strict
from nopad.layers.prefix import PrefixLayout
from nopad.layers.roles import RoleAliases
from nopad.layout import Layout


class ViTEmbeddings(LearnedPositions, RoleAliases):
    """Patches to tokens with learned positions, and each segment's CLS tokens in front of them.

    Each CLS token has a position of its own, the first rows of the table. Other grids get the table resampled as
    `interpolate_pos_encoding` of transformers' models does, or with `positions_antialias` as timm does; bicubically
    unless the config has a `positions_mode` (TIPSv2).

    Args:
        config: of the family.
        num_cls_tokens: 0 without.
    """

    names: Mapping[str, str] = {"proj": "patch_embeddings.projection"}

    def __init__(self, config: Any, *, num_cls_tokens: int = 1):
        super().__init__()
        size = config.hidden_size
        self.patch_embeddings = nn.Module()
        self.proj = PatchEmbedding(config.num_channels, size, config.patch_size, config.patch_order)
        self.num_cls_tokens = num_cls_tokens
        self.cls_token = nn.Parameter(torch.empty(1, num_cls_tokens, size)) if num_cls_tokens else None
        self.grid, self.strict = trained_grid(config), is_strict(config.positions)
        self.mode = check_mode(getattr(config, "positions_mode", "bicubic"))
        self.antialias = config.positions_antialias
        rows, columns = self.grid
        self.position_embeddings = nn.Parameter(torch.empty(1, num_cls_tokens + rows * columns, size))

    def forward(self, patches: Tensor, layout: Layout, prefix_layout: PrefixLayout | None, runner: Runner) -> Tensor:
        """`(T, P)` to `(T + S · num_prefix_tokens, D)`; `prefix_layout` of the prefix tokens, `None` without them."""
        tokens = runner.embed(self.proj, patches) + self.positions(layout)
        if prefix_layout is None:
            return tokens
        return prefix_layout.join(tokens, self.prefix().expand(prefix_layout.segments.num_segments, -1, -1))

    def prefix(self) -> Tensor:
        """The prefix tokens of a segment, `(1, num_prefix_tokens, D)`."""
        assert self.cls_token is not None
        return self.cls_token + self.position_embeddings[:, : self.num_cls_tokens]

    def positions(self, layout: Layout) -> Tensor:
        """`(T, D)` positions of the patches, rounded to the dtype of the weights.

        Raises:
            ValueError: see `table_positions`.
        """
        table = self.position_embeddings[0, -self.grid[0] * self.grid[1] :]
        return table_positions(layout, table, self.grid, mode=self.mode, antialias=self.antialias, strict=self.strict)

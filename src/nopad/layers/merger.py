"""Blocks of neighbouring tokens merged into one each, as vision-language models take them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from nopad.layers.roles import RoleAliases
from nopad.layout import Layout
from nopad.merging import place_in_rows


class PatchMerger(RoleAliases):
    """Qwen-VL's projector: a norm, the tokens of each block side by side, and an MLP.

    Args:
        hidden_size: D.
        merge_size: side of a block, m.
        out_size: E.
        norm_blocks: norm the m² tokens of a block together, as DeepStack does, instead of each.
        norm_class: `nn.LayerNorm` or `nn.RMSNorm`.
        names: see `RoleAliases`; the roles are `norm`, `linear_fc1` and `linear_fc2`.
    """

    def __init__(
        self,
        hidden_size: int,
        merge_size: int,
        out_size: int,
        *,
        norm_blocks: bool = False,
        norm_class: type[nn.LayerNorm | nn.RMSNorm] = nn.LayerNorm,
        names: Mapping[str, str] = MappingProxyType({}),
    ):
        super().__init__()
        self.names = dict(names)  # a copy can be pickled, as all that a module holds must be
        for container in {path.split(".")[0] for path in names.values() if "." in path}:
            self.add_module(container, nn.Module())
        size = hidden_size * merge_size**2
        self.num_tokens, self.norm_blocks = merge_size**2, norm_blocks
        self.norm = norm_class(size if norm_blocks else hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(size, size)
        self.activation = nn.GELU()
        self.linear_fc2 = nn.Linear(size, out_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens in the order of `in_blocks`, `(T, D)` to `(T / m², E)`."""
        if not self.norm_blocks:
            tokens = self.norm(tokens)
        blocks = tokens.reshape(-1, self.linear_fc1.in_features)
        if self.norm_blocks:
            blocks = self.norm(blocks)
        return self.linear_fc2(self.activation(self.linear_fc1(blocks)))


def in_blocks(tokens: Tensor, layout: Layout, merge_size: int) -> Tensor:
    """Tokens `(T, D)` of full grids, block after block, see `nopad.merge`; as many."""
    _, rows, columns = layout.grid_thw[layout.image_index].unbind(1)
    place = layout.index_in_image
    first = torch.arange(len(tokens), device=tokens.device) - place
    return tokens[first + place_in_rows(place, rows, columns, merge_size)]

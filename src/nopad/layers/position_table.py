"""The module of positions that were learned on one grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nopad.layers.positions import learned_positions, resampled_positions
from nopad.layout import Layout
from nopad.traced import TracedLayout


class LearnedPositions:
    """A module with positions that were learned on one grid.

    Attributes:
        grid: its rows and columns.
    """

    grid: tuple[int, int]
    __call__: Callable[..., Any]

    def positions(self, layout: Layout) -> Tensor:
        """Positions of every patch, `(T, D)`: what the module returns; its hooks load offloaded weights."""
        return self(layout)


class PositionTable(LearnedPositions, nn.Module):
    """Positions learned on one grid, with the parameter of `torch.nn.Embedding`; resampled for other grids.

    Args:
        grid: `(rows, columns)` that the positions were learned on.
        hidden_size: D.
        mode, antialias, align_corners: as in `resample`.
        strict: raise on other grids.
        native: learned for grids of any size, as in NaFlex; raises on `patch_positions` and does not log resampling.
        num_prefix_tokens: tokens in front of the patches whose positions are the first rows.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        hidden_size: int,
        *,
        mode: str,
        antialias: bool = True,
        align_corners: bool = False,
        strict: bool = False,
        native: bool = False,
        num_prefix_tokens: int = 0,
    ):
        super().__init__()
        self.grid, self.mode, self.antialias, self.strict, self.native = grid, mode, antialias, strict, native
        self.align_corners = align_corners
        self.num_prefix_tokens = num_prefix_tokens
        self.weight = nn.Parameter(torch.empty(num_prefix_tokens + math.prod(grid), hidden_size))

    def forward(self, layout: Layout | None) -> Tensor:
        """Positions of every patch, `(T, D)`, see `table_positions`; of the prefix tokens for `None`, one row each."""
        if layout is None:
            return self.weight[: self.num_prefix_tokens]
        names = ("mode", "antialias", "align_corners", "strict", "native")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return table_positions(layout, self.weight[self.num_prefix_tokens :], self.grid, **options)


def table_positions(
    layout: Layout,
    table: Tensor,
    grid: tuple[int, int],
    *,
    mode: str,
    antialias: bool = True,
    align_corners: bool = False,
    strict: bool = False,
    native: bool = False,
    crop: bool = False,
) -> Tensor:
    """Positions of every patch, computed in at least float32 and rounded to the dtype of the table.

    Under autocast that is not the dtype of the tokens: the patch embedding of a float32 model returns half precision,
    and the sum with float32 positions is float32, as in the original.

    Args:
        layout: the pack.
        table: `(rows · columns, D)` on the `grid`.
        grid, mode, antialias, align_corners, strict, native: as in `PositionTable`.
        crop: with `native`, as in `resample`.

    Returns:
        `(T, D)`.

    Raises:
        ValueError: `patch_positions` with `native`; see also `learned_positions`.
    """
    dtype = table.dtype
    if isinstance(layout, TracedLayout) and layout.patch_positions is None:
        return positions_of_grids(
            table, layout.grid_thw, layout.image_index, *grid, mode, antialias, align_corners, strict, native, crop
        ).to(dtype)
    options: dict[str, Any] = {"antialias": antialias, "align_corners": align_corners, "dtype": dtype}
    if not native:
        return learned_positions(layout, table, grid, mode=mode, strict=strict, **options).to(dtype)
    if layout.patch_positions is not None:
        raise ValueError(
            "patch_positions: expected None, since these positions are resampled to the whole grid of an image, "
            "which patch_positions do not contain; use a fixed-size checkpoint"
        )
    if not layout.grid:
        return table[:0]
    return resampled_positions(layout, table, grid, mode, channels_last=False, crop=crop, **options).to(dtype)


@torch.library.custom_op("nopad::positions_of_grids", mutates_args=())
def positions_of_grids(
    table: Tensor,
    grid_thw: Tensor,
    image_index: Tensor,
    rows: int,
    columns: int,
    mode: str,
    antialias: bool,
    align_corners: bool,
    strict: bool,
    native: bool,
    crop: bool,
) -> Tensor:
    """Positions as one operator of an exported graph, in which the grid is not known; without a gradient."""
    layout = Layout.of_grid(grid_thw.tolist(), table.device)
    options: dict[str, Any] = {"antialias": antialias, "align_corners": align_corners}
    if native:
        options |= {"channels_last": False, "crop": crop}
        return resampled_positions(layout, table, (rows, columns), mode, **options).contiguous()
    return learned_positions(layout, table, (rows, columns), mode=mode, strict=strict, **options).contiguous()


@positions_of_grids.register_fake
def _(table, grid_thw, image_index, rows, columns, mode, antialias, align_corners, strict, native, crop):
    dtype = torch.promote_types(table.dtype, torch.float32)
    return table.new_empty(image_index.shape[0], table.shape[1], dtype=dtype)


def example_positions(embeddings: nn.Module, device: torch.device) -> Tensor | None:
    """Positions of one image on the grid that those of `embeddings` were learned on; `None` where there are none."""
    for module in embeddings.modules():
        if isinstance(module, LearnedPositions):
            return module.positions(Layout.of_image(*module.grid, device))
    return None

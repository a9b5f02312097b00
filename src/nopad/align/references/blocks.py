"""References that take packs, and tokens block by block as a language model takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nopad.align.reference_model import ReferenceModel
from nopad.merging import merge
from nopad.patches import patchify


class BlocksReference(ReferenceModel):
    """Base class: transformers' encoders of Qwen's language models."""

    def block_order(self, config: Any, grid: list[int]) -> Tensor | None:
        """The block that each block of the model's output is, of an image of `[t, h, w]`; `None` for as they are."""
        return None

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.blocks

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` or clip `(frames, C, H, W)` to patch tokens `(t · h · w, D)`, and no pooled vector."""
        return self.run_batch(model, pixels[None])[0], None

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images or clips of one size, `(B, …)`, to patch tokens `(B, t · h · w, D)`."""
        config = model.config
        size, frames = config.patch_size, config.temporal_patch_size
        parts, (grid, *_) = zip(*(patchify(image, size, "chw", frames) for image in pixels), strict=True)
        patches, grids = torch.cat(parts), torch.tensor([grid] * len(parts))
        blocks = merge(patches, grids, config.spatial_merge_size).view(patches.shape)
        tokens = model(blocks, grid_thw=grids.to(pixels.device)).last_hidden_state
        rows = self._rows(config, list(grid)).to(tokens.device)
        return tokens.unflatten(0, (len(parts), -1)).index_select(1, rows)

    def layer_tokens(self, model: Any, states: Tensor, pixels: Tensor) -> Tensor:
        """Input or output of a layer for one image or clip, as patch tokens `(t · h · w, D)`."""
        size, frames = model.config.patch_size, len(pixels) if pixels.ndim == 4 else 1
        times = -(-frames // model.config.temporal_patch_size)
        rows = self._rows(model.config, [times, pixels.shape[-2] // size, pixels.shape[-1] // size])
        return states[rows.to(states.device)]

    def _rows(self, config: Any, grid: list[int]) -> Tensor:
        """For each patch of an image, row by row, where the model has its token."""
        merge_size, order = config.spatial_merge_size, self.block_order(config, grid)
        patches = merge(torch.arange(grid[0] * grid[1] * grid[2])[:, None], torch.tensor([grid]), merge_size)
        return (patches if order is None else patches[order]).flatten().argsort()

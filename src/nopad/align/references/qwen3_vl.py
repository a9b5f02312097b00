"""The reference of Qwen3-VL and Qwen3.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder
from nopad.families.qwen3_vl_checkpoints import Qwen3_5PackingConfig
from nopad.merging import merge
from nopad.patches import patchify


class Qwen3VLReference(ReferenceModel):
    """transformers' Qwen3-VL and Qwen3.5, which take packs, and tokens in the order of their blocks."""

    model_class = Qwen3VLVisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Qwen3_5VisionModel if isinstance(packed.config, Qwen3_5PackingConfig) else Qwen3VLVisionModel

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
        return self._row_by_row(tokens, grids, config.spatial_merge_size).unflatten(0, (len(parts), -1))

    def layer_tokens(self, model: Any, states: Tensor, pixels: Tensor) -> Tensor:
        """Input or output of a layer for one image or clip, as patch tokens `(t · h · w, D)`."""
        size, frames = model.config.patch_size, len(pixels) if pixels.ndim == 4 else 1
        times = -(-frames // model.config.temporal_patch_size)
        grid = torch.tensor([[times, pixels.shape[-2] // size, pixels.shape[-1] // size]])
        return self._row_by_row(states, grid, model.config.spatial_merge_size)

    def _row_by_row(self, tokens: Tensor, grids: Tensor, merge_size: int) -> Tensor:
        row_order = merge(torch.arange(len(tokens))[:, None], grids, merge_size).flatten()
        return tokens[row_order.argsort().to(tokens.device)]


REFERENCE = Qwen3VLReference()

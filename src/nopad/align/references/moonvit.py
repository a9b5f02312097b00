"""The reference of MoonViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder
from nopad.patches import patchify


class MoonViTReference(ReferenceModel):
    """transformers' MoonViT of Kimi K2.5, which takes packs of patches."""

    model_class = Kimi_K25VisionModel

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights; it merges blocks of one, since others refuse odd grids.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        model = super().load(packed, state, dtype)
        model.merge_kernel_size = (1, 1)
        return model

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.layers

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` or clip `(frames, C, H, W)` to patch tokens `(t · h · w, D)`, and no pooled vector."""
        return self.run_batch(model, pixels[None])[0], None

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images or clips of one size, `(B, …)`, to patch tokens `(B, t · h · w, D)`."""
        size = model.config.patch_size
        parts, (grid, *_) = zip(*(patchify(image, size, "chw") for image in pixels), strict=True)
        patches, grids = torch.cat(parts).unflatten(1, (-1, size, size)), torch.tensor([grid] * len(parts))
        tokens = model(patches, grid_thw=grids.to(pixels.device)).last_hidden_state
        return tokens.unflatten(0, (len(parts), -1))

    def layer_tokens(self, model: Any, states: Tensor, pixels: Tensor) -> Tensor:
        """Input or output of a layer for one image or clip, as patch tokens `(t · h · w, D)`."""
        return states


REFERENCE = MoonViTReference()

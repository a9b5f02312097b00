"""The reference of OneVision-Encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nopad.align.reference_model import RemoteCodeReference


class OneVisionReference(RemoteCodeReference):
    """OneVision-Encoder's own code, which is not part of transformers."""

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images `(B, C, H, W)` or whole clips `(B, frames, C, H, W)` of one size to the reference's output."""
        if pixels.ndim == 4:
            return super().forward(model, pixels)
        size = model.config.patch_size
        clips, frames, _, height, width = pixels.shape
        # With the indices of all patches the reference counts frames 0, 1, 2, …; without, it takes 64 frames alone.
        indices = torch.arange(frames * (height // size) * (width // size), device=pixels.device)
        return model(pixels.transpose(1, 2), visible_indices=indices.expand(clips, -1))


REFERENCE = OneVisionReference()

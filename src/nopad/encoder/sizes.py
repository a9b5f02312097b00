"""Sizes of an encoder, by its config."""

from __future__ import annotations

from typing import Any

from torch import nn

from nopad.checkpoints.strict import hidden_size
from nopad.patches import PatchOrder


class Sizes:
    """Sizes of patches, tokens and vectors."""

    config: Any
    projection: nn.Linear | None

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    @property
    def temporal_patch_size(self) -> int:
        """Frames of a patch: 2 for Qwen3-VL, which takes an image as two equal frames, and 1 for all others."""
        return getattr(self.config, "temporal_patch_size", 1)

    @property
    def merge_size(self) -> int:
        """Side of the blocks of patches that the model merges: rows and columns are multiples of it. 1 for most."""
        return getattr(self.config, "spatial_merge_size", 1)

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.temporal_patch_size * self.config.patch_size**2 * self.config.num_channels

    @property
    def patch_order(self) -> PatchOrder:
        """Layout inside a patch."""
        return self.config.patch_order

    @property
    def hidden_size(self) -> int:
        """Values of a token."""
        return hidden_size(self.config)

    @property
    def pooled_size(self) -> int:
        """Values of `pooled`: D for most."""
        return self.hidden_size

    @property
    def projection_dim(self) -> int | None:
        """Values of `image_embeds`, `None` where the checkpoint has no projection."""
        return None if self.projection is None else self.projection.out_features

    @property
    def embedding_size(self) -> int:
        """Values of the vector that `embed` gives for an image: E, or those of `pooled`."""
        return self.projection_dim or self.pooled_size

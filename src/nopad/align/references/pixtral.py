"""The reference of Pixtral."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

from nopad.align.reference_model import ReferenceModel


class PixtralReference(ReferenceModel):
    """transformers' Pixtral, which takes a batch as one sequence with a mask."""

    model_class = PixtralVisionModel

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.transformer.layers

    def run_batch(self, model: Any, pixels: Tensor) -> Tensor:
        """Images of one size `(B, C, H, W)` to patch tokens `(B, h · w, D)`."""
        return self.forward(model, pixels).last_hidden_state[0].unflatten(0, (len(pixels), -1))


REFERENCE = PixtralReference()

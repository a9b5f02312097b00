"""The reference of CLIP and MetaCLIP 2."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.clip_checkpoints import MetaCLIP2PackingConfig


class CLIPReference(ReferenceModel):
    """transformers' CLIP and MetaCLIP 2, whose tokens are normed here, as those of OpenCLIP and timm are."""

    model_class = CLIPVisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return MetaClip2VisionModel if isinstance(packed.config, MetaCLIP2PackingConfig) else CLIPVisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where other grids get positions as in OpenCLIP and timm, else any."""
        return trained_grid(packed.config) if packed.config.positions_antialias else None

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to the reference's output."""
        output = model(pixel_values=pixels, interpolate_pos_encoding=True)
        output.last_hidden_state = model.post_layernorm(output.last_hidden_state)
        return output


REFERENCE = CLIPReference()

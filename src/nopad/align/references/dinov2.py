"""The references of DINOv2 and TIPSv2."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder

_CLASSES = {
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
    "tipsv2_vision_model": Tipsv2VisionModel,
}


class DINOv2Reference(ReferenceModel):
    """transformers' DINOv2, with and without registers, and TIPSv2's image encoder."""

    model_class = Dinov2Model

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return _CLASSES[packed.config.model_type]

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where timm resamples positions otherwise than transformers does, else any."""
        config, own = packed.config, type(packed.config)
        names = [name for name in ("positions_antialias", "positions_mode") if hasattr(own, name)]
        as_transformers = all(getattr(config, name) == getattr(own, name) for name in names)
        return None if as_transformers else trained_grid(config)

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.encoder.layer


REFERENCE = DINOv2Reference()

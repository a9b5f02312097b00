"""The reference of DINOv2."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.dinov2_checkpoints import DINOv2WithRegistersPackingConfig


class DINOv2Reference(ReferenceModel):
    """transformers' DINOv2, with and without registers."""

    model_class = Dinov2Model

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        with_registers = isinstance(packed.config, DINOv2WithRegistersPackingConfig)
        return Dinov2WithRegistersModel if with_registers else Dinov2Model

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where timm resamples positions otherwise than transformers does, else any."""
        as_transformers = packed.config.positions_antialias == type(packed.config).positions_antialias
        return None if as_transformers else trained_grid(packed.config)

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.encoder.layer


REFERENCE = DINOv2Reference()

"""The reference of AIMv2."""

from __future__ import annotations

from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder


class AIMv2Reference(ReferenceModel):
    """transformers' AIMv2."""

    model_class = Aimv2VisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """Learned positions: the trained grid."""
        return None if packed.config.is_native else trained_grid(packed.config)


REFERENCE = AIMv2Reference()

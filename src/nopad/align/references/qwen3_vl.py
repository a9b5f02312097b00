"""The reference of Qwen3-VL and Qwen3.5."""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from nopad.align.references.blocks import BlocksReference
from nopad.encoder import PackedEncoder
from nopad.families.qwen3_vl_checkpoints import Qwen3_5PackingConfig


class Qwen3VLReference(BlocksReference):
    """transformers' Qwen3-VL and Qwen3.5."""

    model_class = Qwen3VLVisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Qwen3_5VisionModel if isinstance(packed.config, Qwen3_5PackingConfig) else Qwen3VLVisionModel


REFERENCE = Qwen3VLReference()

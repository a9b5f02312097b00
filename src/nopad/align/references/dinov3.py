"""The reference of DINOv3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder


class DINOv3Reference(ReferenceModel):
    """transformers' DINOv3."""

    model_class = DINOv3ViTModel

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The reference's config for the same architecture.

        Raises:
            ValueError: CLS and register tokens have a norm of their own, which transformers' model does not.
        """
        if packed.config.untie_cls_norm:
            raise ValueError(
                f"checkpoint {packed.source!r}: its CLS and register tokens have a norm of their own (cls_norm), "
                f"which transformers' DINOv3ViTModel does not have; there is no reference to compare with"
            )
        return super().config(packed)

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        model = super().load(packed, state, dtype)
        if packed.config.rope_periods is not None:
            with torch.no_grad():
                model.rope_embeddings.inv_freq.copy_(1 / torch.tensor(packed.config.rope_periods, dtype=torch.float32))
        return model

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers, which transformers has moved from `layer` to `model.layer`."""
        return (model.model if hasattr(model, "model") else model).layer


REFERENCE = DINOv3Reference()

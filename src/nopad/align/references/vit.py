"""The references of plain vision transformers, MAE, I-JEPA and Pixio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.ijepa.modeling_ijepa import IJepaModel
from transformers.models.pixio.modeling_pixio import PixioModel
from transformers.models.vit.modeling_vit import ViTModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder

_CLASSES = {"vit": ViTModel, "vit_mae": ViTMAEModel, "ijepa": IJepaModel, "pixio": PixioModel}


class ViTReference(ReferenceModel):
    """transformers' ViT, MAE with nothing masked, I-JEPA and Pixio."""

    model_class = ViTModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return _CLASSES[packed.config.model_type]

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """See `ReferenceModel`; MAE masks nothing."""
        config: Any = super().config(packed)
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0
        return config

    def arguments(self, packed: PackedEncoder) -> dict[str, Any]:
        """Further arguments of the class."""
        return {"add_pooling_layer": packed.head is not None} if packed.config.model_type == "vit" else {}

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where other grids get positions as in timm, else any."""
        return trained_grid(packed.config) if packed.config.positions_antialias else None

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.layers

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to the reference's output."""
        if isinstance(model, PixioModel):  # which always resamples
            return model(pixel_values=pixels)
        options: dict[str, Any] = {"interpolate_pos_encoding": True}
        if isinstance(model, ViTMAEModel):  # which orders patches by its noise
            size: Any = model.config.patch_size
            area = (pixels.shape[2] // size) * (pixels.shape[3] // size)
            options["noise"] = torch.arange(area, device=pixels.device).expand(len(pixels), -1)
        return model(pixel_values=pixels, **options)


REFERENCE = ViTReference()

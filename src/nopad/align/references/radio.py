"""The reference of C-RADIO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.radio.modeling_radio import RadioModel

from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder


class RadioReference(ReferenceModel):
    """transformers' C-RADIO."""

    model_class = RadioModel

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """See `ReferenceModel`; without the patches of clips, which no encoder here has."""
        config: Any = super().config(packed)
        config.video_temporal_patch_size = config.video_patch_dim = None
        return config

    def load(self, packed: PackedEncoder, state: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """The reference with exactly these weights; where the encoder takes normalised pixels, so does it.

        Raises:
            ValueError: a tensor too few, too many or of another shape.
        """
        if packed.config.normalize_pixels:
            return super().load(packed, state, dtype)
        ones, zeros = (value(packed.config.num_channels, 1, 1) for value in (torch.ones, torch.zeros))
        state = {**state, "input_conditioner.norm_mean": zeros, "input_conditioner.norm_std": ones}
        return super().load(packed, state, dtype)

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """A grid as long as that of the positions where others get them with aligned corners, else any."""
        rows, columns = packed.embeddings.grid
        return (max(rows // 8, 1), columns) if packed.config.positions_align_corners else None

    def layers(self, model: Any) -> nn.ModuleList:
        """The reference's transformer layers."""
        return model.encoder.layer

    def run(self, model: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """One image `(C, H, W)` to patch tokens `(h · w, D)` and the summary."""
        output = self.forward(model, pixels[None])
        return output.features[0], output.summary[0]


REFERENCE = RadioReference()

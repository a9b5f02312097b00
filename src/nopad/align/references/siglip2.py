"""The reference of SigLIP2 and SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

from nopad.align.reference_model import ReferenceModel
from nopad.checkpoints.formats import trained_grid
from nopad.encoder import PackedEncoder
from nopad.families.siglip2 import is_naflex
from nopad.patches import patchify


class Siglip2Reference(ReferenceModel):
    """transformers' SigLIP2 for NaFlex, and its SigLIP for fixed sizes, which interpolates positions on other grids."""

    model_class = Siglip2VisionModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        return Siglip2VisionModel if is_naflex(packed.config) else SiglipVisionModel

    def only_grid(self, packed: PackedEncoder) -> tuple[int, int] | None:
        """The trained grid where other grids get positions as in timm, else any."""
        antialias = getattr(packed.config, "positions_antialias", False)
        return trained_grid(packed.config) if antialias else None

    def config(self, packed: PackedEncoder) -> PreTrainedConfig:
        """The reference's config for the same architecture."""
        config: Any = super().config(packed)
        config.vision_use_head = packed.config.vision_use_head
        return config

    def forward(self, model: Any, pixels: Tensor) -> Any:
        """Images of one size `(B, C, H, W)` to the reference's output."""
        if isinstance(model, SiglipVisionModel):
            return model(pixel_values=pixels, interpolate_pos_encoding=True)
        patches, (images, rows, columns) = patchify(pixels, model.config.patch_size)
        return _naflex(model, patches.unflatten(0, (images, -1)), [(rows, columns)] * images)

    def takes_padding(self, packed: PackedEncoder) -> bool:
        """NaFlex is made for it."""
        return is_naflex(packed.config)

    def run_padded(self, model: Any, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Padded as by its processor, but to the longest image of the batch, not to `max_num_patches`."""
        parts, grids = zip(*(patchify(image, model.config.patch_size) for image in pixels), strict=True)
        output = _naflex(model, pad_sequence(list(parts), batch_first=True), [grid[1:] for grid in grids])
        return [tokens[: len(part)] for tokens, part in zip(output.last_hidden_state, parts, strict=True)]


def _naflex(model: Any, patches: Tensor, shapes: Sequence[tuple[int, int]]) -> Any:
    """Patches `(B, L, P)`, of each image as many as its `(rows, columns)` are, to the output of a NaFlex model."""
    spatial_shapes = torch.tensor(shapes)
    lengths = spatial_shapes.prod(1, keepdim=True).to(patches.device)
    mask = torch.arange(patches.shape[1], device=patches.device) < lengths
    return model(pixel_values=patches, pixel_attention_mask=mask.int(), spatial_shapes=spatial_shapes)


REFERENCE = Siglip2Reference()

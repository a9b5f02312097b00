"""Tiny SigLIP2 and SigLIP models of transformers with random weights, and the original run on one image."""

from __future__ import annotations

from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from torch import Tensor
from transformers.models.siglip.configuration_siglip import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipModel, SiglipVisionModel
from transformers.models.siglip2.configuration_siglip2 import Siglip2Config, Siglip2TextConfig, Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2Model, Siglip2VisionModel

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 8,
}


def naflex(**changes) -> Siglip2VisionModel:
    """Positions learned on 5 × 5 patches."""
    return _random(Siglip2VisionModel(Siglip2VisionConfig(**{**FIELDS, "num_patches": 25, **changes})))


def fixed(**changes) -> SiglipVisionModel:
    """Images of 22 pixels: 5 × 5 patches and two pixels that no patch covers."""
    return _random(SiglipVisionModel(SiglipVisionConfig(**{**FIELDS, "image_size": 22, **changes})))


def naflex_composite(**text_changes) -> Siglip2Model:
    vision, text = naflex().config.to_dict(), Siglip2TextConfig(**{**TEXT, **text_changes}).to_dict()
    return _random(Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)))


def fixed_composite(**text_changes) -> SiglipModel:
    vision, text = fixed().config.to_dict(), SiglipTextConfig(**{**TEXT, **text_changes}).to_dict()
    return _random(SiglipModel(SiglipConfig(vision_config=vision, text_config=text)))


KINDS = {"naflex": naflex, "fixed": fixed}


def _random(model):
    randomize(model)
    return model.eval()


def folder_of(folder: Path, original, prefix: str = "") -> Path:
    """The original as a checkpoint, its tensor names with a prefix."""
    state = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    return write(folder, state, original.config.to_dict())


def run(original, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens and pooled vector of one image `(C, H, W)`; patches cut as the original's image processor cuts them."""
    if isinstance(original, SiglipVisionModel):
        output = original(pixel_values=image[None], interpolate_pos_encoding=True)
    else:
        patch_size = original.config.patch_size
        rows, columns = (side // patch_size for side in image.shape[1:])
        patches = image.reshape(3, rows, patch_size, columns, patch_size).permute(1, 3, 2, 4, 0)
        output = original(
            pixel_values=patches.reshape(1, rows * columns, -1),
            pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.int32),
            spatial_shapes=torch.tensor([[rows, columns]]),
        )
    pooled = output.pooler_output
    return output.last_hidden_state[0], None if pooled is None else pooled[0]

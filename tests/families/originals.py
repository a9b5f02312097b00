"""The originals of `tiny_encoders`: read from a folder, and run on one image."""

from __future__ import annotations

from pathlib import Path

import siglip2_checkpoints
from onevision_original import PlainConfig, PlainOneVision
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

ORIGINALS = {
    "aimv2": Aimv2VisionModel,
    "siglip2": Siglip2VisionModel,
    "siglip": siglip2_checkpoints.SiglipVisionModel,
    "dinov3": DINOv3ViTModel,
    "onevision": PlainOneVision,
}


def original_class(family: str):
    """The class of a family in `tiny_encoders.FAMILIES`."""
    return ORIGINALS[family.split()[0]]


def read_by_original(family: str, folder: Path):
    """The original with the weights of a folder, nothing missing and nothing left over."""
    if family == "onevision":  # its rope tables are not saved, and `from_pretrained` does not make them
        original = PlainOneVision(PlainConfig.from_pretrained(folder))
        original.load_state_dict(load_file(folder / "model.safetensors"))
        return original.eval()
    original, told = original_class(family).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    return original


def run_original(family: str, original, image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patch tokens and pooled vector of one image `(C, H, W)`."""
    if family.startswith("siglip"):
        return siglip2_checkpoints.run(original, image)
    output = original(image[None])
    tokens, pooled = output.last_hidden_state[0], output.pooler_output
    if family.startswith("dinov3"):
        tokens = tokens[1 + original.config.num_register_tokens :]
    return tokens, None if pooled is None else pooled[0]

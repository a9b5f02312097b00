"""The originals of `tiny_encoders`: read from a folder, and run on one image or clip."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import clip_checkpoints
import moonvit_checkpoints
import onevision_checkpoints
import pe_checkpoints
import qwen2_vl_checkpoints
import qwen3_vl_checkpoints
import radio_checkpoints
import siglip2_checkpoints
import torch
import vit_checkpoints
from onevision_original import PlainConfig, PlainOneVision
from pe_original import PlainPE
from renaming import in_memory
from safetensors.torch import load_file
from tiny_encoders import pack_of
from torch import Tensor, nn
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel
from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionModel

ORIGINALS = {
    "aimv2": Aimv2VisionModel,
    "siglip2": Siglip2VisionModel,
    "siglip": siglip2_checkpoints.SiglipVisionModel,
    "clip": CLIPVisionModel,
    "metaclip2": MetaClip2VisionModel,
    "dinov2": Dinov2Model,
    "dinov2 gated": Dinov2WithRegistersModel,
    "tipsv2": Tipsv2VisionModel,
    "dinov3": DINOv3ViTModel,
    "onevision": PlainOneVision,
    "moonvit": moonvit_checkpoints.Kimi_K25VisionModel,
    "pixtral": PixtralVisionModel,
    **qwen2_vl_checkpoints.CLASSES,
    "qwen3_vl": Qwen3VLVisionModel,
    "qwen3_5": Qwen3_5VisionModel,
    "radio": radio_checkpoints.RadioModel,
    "pe": PlainPE,
    **{kind: model for kind, (_, model) in vit_checkpoints.CLASSES.items()},
}


def original_class(family: str):
    """The class of a family in `tiny_encoders.FAMILIES`."""
    return ORIGINALS.get(family, ORIGINALS[family.split()[0]])


def read_by_original(family: str, folder: Path):
    """The original with the weights of a folder, nothing missing and nothing left over."""
    if family == "onevision":  # its rope tables are not saved, and `from_pretrained` does not make them
        original = PlainOneVision(PlainConfig.from_pretrained(folder))
        original.load_state_dict(load_file(folder / "model.safetensors"))
        return original.eval()
    if family.startswith("pe"):
        return pe_checkpoints.read(folder)
    pooled = family != "vit" or "pooler.dense.weight" in load_file(folder / "model.safetensors")
    options = {} if pooled else {"add_pooling_layer": False}
    original, info = original_class(family).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return original


def layers_of(original) -> nn.ModuleList:
    """Its transformer layers."""
    if hasattr(original, "blocks"):
        return original.blocks
    if hasattr(original, "layers"):
        return original.layers
    names = ("encoder", "transformer", "model")
    backbone = next(getattr(original, name) for name in names if hasattr(original, name))
    if isinstance(backbone, nn.ModuleDict):
        return next(iter(backbone.values()))
    return backbone.layers if hasattr(backbone, "layers") else backbone.layer


class Features(NamedTuple):
    """What an original makes of one image or clip.

    Attributes:
        tokens: `(T, D)` of the patches.
        pooled: `(D,)`, `None` without pooling.
        prefix: `(frames, number, D)`, `None` where there are no prefix tokens.
    """

    tokens: Tensor
    pooled: Tensor | None
    prefix: Tensor | None = None


def run_original(family: str, original, pixels: Tensor) -> Features:
    """Features of one image `(C, H, W)`, or of one clip `(frames, C, H, W)`.

    Clips go through OneVision, MoonViT and Qwen's encoders as a whole, else frame by frame.
    """
    if family == "onevision":
        return Features(*onevision_checkpoints.run(original, pixels))
    if family.startswith("qwen2"):
        return Features(qwen2_vl_checkpoints.run(original, pixels).tokens, None)
    if family.startswith("qwen3"):
        return Features(qwen3_vl_checkpoints.run(original, pixels).tokens, None)
    if family == "moonvit":
        return Features(moonvit_checkpoints.run(original, pixels), None)
    if pixels.ndim == 4:
        frames = [run_original(family, original, frame) for frame in pixels]
        tokens, pooled, prefix = zip(*frames, strict=True)
        return Features(
            torch.cat(tokens),
            None if pooled[0] is None else torch.stack(pooled).mean(dim=0),
            None if prefix[0] is None else torch.cat(prefix),
        )
    if family.startswith("pe"):
        return Features(*pe_checkpoints.run(original, pixels))
    if family == "radio":
        return Features(*radio_checkpoints.run(original, pixels))
    if family.startswith("siglip"):
        return Features(*siglip2_checkpoints.run(original, pixels))
    if family in ("clip", "metaclip2"):
        return Features(*clip_checkpoints.run(original, pixels))
    if family in vit_checkpoints.CLASSES:
        return Features(*vit_checkpoints.run(original, pixels))
    output = original(pixels[None])
    tokens, pooled = output.last_hidden_state[0], getattr(output, "pooler_output", None)
    number = 1 + getattr(original.config, "num_register_tokens", 0) if family.startswith(("dino", "tips")) else 0
    prefix = tokens[None, :number] if number else None
    return Features(tokens[number:], None if pooled is None else pooled[0], prefix)


def patch_rows_of(family: str, original, states: Tensor, pixels: Tensor) -> Tensor:
    """Rows of a layer of an original `(1, T, D)` or `(T, D)` for one image or clip, as `(T, D)` in their order."""
    states = states if states.ndim == 2 else states[0]
    if not family.startswith("qwen2"):
        return states
    return qwen2_vl_checkpoints.to_rows(original, states, qwen3_vl_checkpoints.blocks_of(pixels, original.config)[1])


GRIDS = [(1, 3, 5), (1, 1, 1), (3, 2, 4), (1, 60, 1), (1, 1, 60), (2, 5, 5)]
"""Images, among them of one patch and of one row, and clips."""


def grids_of(family: str) -> list[tuple[int, int, int]]:
    """Grids that the original takes: of AIMv2's learned positions the trained one alone."""
    return [(1, 5, 5), (2, 5, 5), (1, 5, 5)] if family == "aimv2 with a head" else GRIDS


def pixels_of(grids, patch_size: int = 4, seed: int = 0) -> list[Tensor]:
    """Random images `(C, H, W)` and clips `(frames, C, H, W)`."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(t, 3, h * patch_size, w * patch_size, generator=generator) for t, h, w in grids]
    return [image[0] if len(image) == 1 else image for image in images]


def max_relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two vectors, over the norm of the second."""
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


@torch.no_grad()
def assert_parity(family: str, encoder, original, grids=None, tolerance: float = 1e-4) -> None:
    """All images in one pack have the features that the original gives one by one."""
    grids = grids_of(family) if grids is None else grids
    pixels = pixels_of(grids, encoder.patch_size * encoder.merge_size)
    pack = pack_of(encoder, pixels)
    output = encoder.encode(pack)
    prefixes = [None] * len(grids)
    if output.prefix_tokens is not None:
        prefixes = output.prefix_tokens.split([t for t, _, _ in grids])
    for tokens, pooled, prefix, image in zip(pack.unpack(output.tokens), output.pooled, prefixes, pixels, strict=True):
        expected = run_original(family, original, image)
        assert max_relative(tokens.flatten(0, 2), expected.tokens) < tolerance
        mean = expected.tokens.unflatten(0, (tokens.shape[0], -1)).mean(dim=(0, 1))
        assert max_relative(pooled, mean if expected.pooled is None else expected.pooled) < tolerance
        assert (prefix is None) == (expected.prefix is None)
        assert prefix is None or max_relative(prefix, expected.prefix) < tolerance


def assert_gradients(family: str, encoder, original, grids=None) -> None:
    """All images in one pack give every parameter the gradient that the original gives it one by one."""
    pixels = pixels_of(grids_of(family) if grids is None else grids, encoder.patch_size * encoder.merge_size)
    theirs = [run_original(family, original, image) for image in pixels]
    output = encoder.encode(pack_of(encoder, pixels))
    weights, pooled_weights = torch.randn_like(output.tokens), torch.randn_like(output.pooled)
    loss = (output.tokens * weights).sum()
    expected = (torch.cat([each.tokens for each in theirs]) * weights).sum()
    if theirs[0].pooled is not None:
        loss = loss + (output.pooled * pooled_weights).sum()
        expected = expected + (torch.stack([each.pooled for each in theirs]) * pooled_weights).sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-3)
    gradients = in_memory(family, {name: parameter.grad for name, parameter in original.named_parameters()})
    ours = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        if gradient is None:  # mask tokens, which are for masked training
            assert ours[name] is None or not ours[name].any(), name
            continue
        if not gradient.numel():  # no register tokens
            continue
        # Softmax does not see the bias of keys: its gradient is zero but for rounding.
        scale = float(gradients[name.replace("k_proj.bias", "v_proj.bias")].abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * scale, msg=name)

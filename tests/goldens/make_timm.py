"""Writes the golden cases `timm-*`: tiny models of timm with random weights, saved by timm, and what they return.

pip install timm==1.0.31 torch==2.14.1 torchvision==0.29.1 safetensors
python tests/goldens/make_timm.py tests/goldens
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4, "mlp_ratio": 1.5}
GRIDS = [(5, 5), (3, 7), (1, 6), (8, 2)]
CASES = {
    "timm-aimv2": ("aimv2_large_patch14_224", {"img_size": 20}, GRIDS[:1]),
    "timm-aimv2-dynamic": ("aimv2_huge_patch14_336", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-dinov2": ("vit_base_patch14_dinov2", {"img_size": 20, "dynamic_img_size": True, "mlp_ratio": 2.0}, GRIDS),
    "timm-dinov2-gated": ("vit_giant_patch14_dinov2", {"img_size": 20, "mlp_ratio": 3.0}, GRIDS[:1]),
    "timm-dinov2-registers": (
        "vit_small_patch14_reg4_dinov2",
        {"img_size": 20, "dynamic_img_size": True, "mlp_ratio": 2.0},
        GRIDS,
    ),
    "timm-tipsv2": ("vit_so400m_patch14_reg1_tipsv2", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-dinov3": ("vit_small_patch16_dinov3", {"img_size": 20}, GRIDS),
    "timm-dinov3-gated": ("vit_huge_plus_patch16_dinov3_qkvb", {"img_size": 20, "rope_temperature": 50.0}, GRIDS),
    "timm-siglip": ("vit_base_patch16_siglip_224", {"img_size": 20}, GRIDS[:1]),
    "timm-siglip-tanh": ("vit_so400m_patch16_siglip_256", {"img_size": 20}, GRIDS[:1]),
    "timm-siglip-gap": ("vit_large_patch16_siglip_gap_256", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-clip": ("vit_large_patch14_clip_224", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-clip-projection": ("vit_base_patch32_clip_quickgelu_224.openai", {"img_size": 20}, GRIDS[:1]),
    "timm-pe-core": ("vit_pe_core_base_patch16_224", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-pe-core-projection": ("vit_pe_core_gigantic_patch14_448.fb", {"img_size": 20}, GRIDS[:1]),
    "timm-pe-lang": (
        "vit_pe_lang_gigantic_patch14_448",
        {"img_size": 20, "dynamic_img_size": True, "rope_temperature": 50.0},
        GRIDS,
    ),
    "timm-pe-spatial": ("vit_pe_spatial_base_patch16_512", {"img_size": 20, "ref_feat_shape": (5, 5)}, GRIDS[:1]),
    "timm-qwen3": (
        "qwen3_vit_306m_enc",
        {"pos_embed_grid_size": 5, "out_features": 16, "rope_temperature": 50.0},
        [(4, 4), (2, 6), (8, 2)],
    ),
    "timm-vit": ("vit_base_patch16_224", {"img_size": 20, "dynamic_img_size": True}, GRIDS),
    "timm-naflexvit": ("naflexvit_so400m_patch16_siglip", {"pos_embed_grid_size": (5, 5)}, GRIDS),
}


def randomize(model: torch.nn.Module) -> None:
    """Weights far from their init, so that any two swapped tensors show, and activations show their curvature."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))


def run(model: torch.nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens `(h · w, D)` and the pooled vector `(D,)`; of DINOv3, the CLS token as the original pools."""
    if hasattr(model, "embeds"):
        patch = 4
        rows, columns = image.shape[2] // patch, image.shape[3] // patch
        patches = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
        coordinates = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[None]
        arguments = {"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones(1, rows * columns) > 0}
        tokens = model.forward_features(**arguments)["patches"]
        return tokens[0], model.forward_head(tokens, pre_logits=True)[0]
    tokens = model.forward_features(image)
    if hasattr(model, "merger"):  # without a final norm, row by row
        tokens = tokens.flatten(1, 2)
        return tokens[0], tokens[0].mean(dim=0)
    if type(getattr(model, "rope", None)).__name__ == "RotaryEmbeddingCat":  # PE, which does not pool by CLS
        return tokens[0, model.num_prefix_tokens :], model.forward_head(tokens, pre_logits=True)[0]
    if model.num_prefix_tokens:
        return tokens[0, model.num_prefix_tokens :], tokens[0, 0]
    return tokens[0], model.forward_head(tokens, pre_logits=True)[0]


def intermediates(model: torch.nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `forward_intermediates` returns of both layers, and of the first after the final norm; by name.

    Maps are `(D, h, w)`, prefix tokens `(number, D)`.
    """
    result = {}
    for name, norm in (("plain", False), ("normed", True)):
        layers = model.forward_intermediates(
            image,
            indices=[0] if norm else [0, 1],
            norm=norm,
            return_prefix_tokens=bool(model.num_prefix_tokens),
            intermediates_only=True,
        )
        for layer, tensors in enumerate(layers):
            maps, *prefix = tensors if model.num_prefix_tokens else [tensors]
            result[f"{name}_{layer}"] = maps[0].contiguous()
            if prefix:
                result[f"{name}_{layer}_prefix"] = prefix[0][0].contiguous()
    return result


def main(folder: Path, *names: str) -> None:
    """Write all cases, or those that are named."""
    for name in names or CASES:
        architecture, arguments, grids = CASES[name]
        projection = 24 if name.endswith("projection") else 0  # of CLIP, which timm keeps as a classifier without bias
        arguments = {"num_classes": projection, **SMALL, **arguments}
        model = timm.create_model(architecture, pretrained=False, **arguments).eval()
        randomize(model)
        if projection:
            torch.nn.init.zeros_(model.head.bias)
        save_for_hf(model, folder / name, safe_serialization=True)
        generator = torch.Generator().manual_seed(1)
        images = [torch.randn(1, 3, 4 * rows, 4 * columns, generator=generator) for rows, columns in grids]
        expected, of_layers = {}, {}
        with torch.no_grad():
            for number, image in enumerate(images):
                tokens, pooled = run(model, image)
                expected |= {f"tokens_{number}": tokens.contiguous(), f"pooled_{number}": pooled.contiguous()}
                if hasattr(model, "merger"):
                    expected[f"merged_{number}"] = model(image)[0].contiguous()
                if projection:
                    expected[f"image_embed_{number}"] = model(image)[0].contiguous()
                if number < 2:
                    of_layers |= {f"{key}_{number}": value for key, value in intermediates(model, image).items()}
        save_file(
            {f"image_{number}": image for number, image in enumerate(images)}, folder / name / "inputs.safetensors"
        )
        save_file(expected, folder / name / "expected.safetensors")
        save_file(of_layers, folder / name / "intermediates.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

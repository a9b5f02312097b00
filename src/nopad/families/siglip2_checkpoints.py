"""SigLIP2's and SigLIP's checkpoints: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

import math
from typing import Any

from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.dialects.siglip2 import TIMM, TIMM_NAFLEX
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.checkpoints.timm_config import PLAIN_VIT, is_timm, read_model_args
from nopad.families.sizes import size_fields


class Siglip2PackingConfig(Siglip2VisionConfig):
    """transformers' config of NaFlex checkpoints and what packing adds to it.

    Attributes:
        vision_use_head: whether there is attention pooling.
        patch_order: layout inside a patch.
        positions: `"resample"`, which is what NaFlex does for every image.
    """

    vision_use_head: bool = True  # not declared by transformers 5.17, which reads it
    patch_order: str = "hwc"
    positions: str = "resample"


class SiglipPackingConfig(SiglipVisionConfig):
    """transformers' config of fixed-size checkpoints and what packing adds to it.

    Attributes:
        vision_use_head: whether there is attention pooling.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: resample them as timm does, not as transformers does.
    """

    vision_use_head: bool = True  # not declared by transformers 5.17, which reads it
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


SiglipConfigs = Siglip2PackingConfig | SiglipPackingConfig


_COMMON_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels patch_size hidden_act layer_norm_eps
attention_dropout vision_use_head patch_order positions
"""
_TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
_TIMM_TANH = {("base", "patch32"), ("so400m", "patch16"), ("large", "512")}
"""Models of timm that approximate GELU, by size and patch or image; in transformers the others do, too."""
_TIMM_ARCHITECTURES = r"vit_(base|large|so400m|giantopt)_patch(14|16|32)_siglip(_gap)?_(\d+)"
_NAFLEX_ARCHITECTURES = r"naflexvit_(base|so400m)_patch16_siglip"
_NAFLEX_FIXED = {
    **PLAIN_VIT,
    **dict.fromkeys(("pos_embed_ar_preserving", "pos_embed_align_corners", "pos_embed_use_grid_sample"), False),
    **dict.fromkeys(("scale_attn_inner_norm", "attn_gated", "attn_only_layer_scale", "use_key_only_attn_mask"), False),
    **dict.fromkeys(("pos_embed_antialias", "patchify_channels_last", "qkv_fused"), True),
    **dict.fromkeys(("input_norm_layer", "embed_norm_layer", "norm_layer", "mlp_layer", "attn_layer"), None),
    **dict.fromkeys(("num_kv_heads", "attn_pool_num_heads", "attn_pool_mlp_ratio", "block_fn"), None),
    "pos_embed": "learned",
    "pos_embed_interp_mode": "bilinear",
    "embed_proj_type": "linear",
    "rope_type": "",
    "attn_type": "standard",
}
_KERNEL, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_LAYERS = "encoder.layers."


def read_config(checkpoint: Checkpoint) -> SiglipConfigs:
    """The architecture: its kind from the patch embedding, the rest from `config.json`, else from the tensors.

    transformers leaves defaults out of `config.json`, so a field that is missing in a config of its own is a default.

    Raises:
        ValueError: no config and shapes that no published model has.
    """
    checkpoint.check_model_type("siglip2", "siglip2_vision_model", "siglip", "siglip_vision_model")
    ndim = len(checkpoint.shape(_KERNEL, {TIMM: 4, TIMM_NAFLEX: 2}.get(checkpoint.table)))
    if ndim not in (2, 4):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {_KERNEL!r} is misshapen, expected the matrix of NaFlex or the kernel "
            f"(D, C, p, p) of a fixed size, got {checkpoint.shape(_KERNEL)}"
        )
    config_class = Siglip2PackingConfig if ndim == 2 else SiglipPackingConfig
    fields = _read_timm_config(checkpoint) if is_timm(checkpoint.config) else _read_config_json(checkpoint, ndim)
    model_types = {config_class.model_type, config_class.model_type.removesuffix("_vision_model")}
    if model_types.isdisjoint({checkpoint.vision_config.get("model_type"), checkpoint.config.get("model_type")}):
        fields = {**_infer_from_tensors(checkpoint, fields), **fields}
    if checkpoint.table is TIMM:
        if "hidden_act" not in fields:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: the activation is known from timm's config.json alone; add it, or "
                f"one with hidden_act"
            )
        fields.setdefault("positions_antialias", True)
    return config_class(**fields)


def _read_config_json(checkpoint: Checkpoint, ndim: int) -> dict[str, Any]:
    """The fields of transformers' `config.json`."""
    sizes = ("num_patches", "image_size") if ndim == 2 else ("image_size", "num_patches")
    names = (*_COMMON_NAMES.split(), sizes[0], *(["positions_antialias"] if ndim == 4 else []))
    return read_fields(checkpoint, names, unused=sizes[1:])


def _read_timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of timm's `config.json`; the activation follows from the architecture.

    Raises:
        ValueError: no architecture; see also `read_model_args`.
    """
    naflex = checkpoint.table is TIMM_NAFLEX
    architectures = _NAFLEX_ARCHITECTURES if naflex else _TIMM_ARCHITECTURES
    fixed = _NAFLEX_FIXED if naflex else PLAIN_VIT
    architecture, fields = read_model_args(checkpoint, architectures, fixed=fixed)
    _, size, patch, *_, image = architecture.split("_")
    tanh = naflex or size == "giantopt" or (size, patch) in _TIMM_TANH or (size, image) in _TIMM_TANH
    activation = "gelu_pytorch_tanh" if tanh else "gelu"
    return {"hidden_act": activation, "num_attention_heads": _TIMM_HEADS[size]} | fields


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    kernel, positions = checkpoint.shape(_KERNEL), checkpoint.shape(_POSITIONS, 2)[0]
    side = grid_side(positions, f"checkpoint {checkpoint.name!r}")
    fields: dict[str, Any] = {
        "hidden_size": kernel[0],
        "intermediate_size": checkpoint.shape(f"{_LAYERS}0.mlp.fc1.bias", 1)[0],
        "num_hidden_layers": checkpoint.count(_LAYERS),
        "vision_use_head": any(name.startswith("head.") for name in checkpoint.tensors),
    }
    if len(kernel) == 4:
        patch_size = kernel[2]
        # A side that patches do not fill is not in the shapes.
        sizes = {
            model["image_size"]
            for model in PUBLISHED.values()
            if model["patch_size"] == patch_size and model.get("image_size", 0) // patch_size == side
        }
        fields |= {"num_channels": kernel[1], "patch_size": patch_size}
        fields["image_size"] = sizes.pop() if len(sizes) == 1 else side * patch_size
    else:
        fields |= {"num_channels": 3, "patch_size": math.isqrt(kernel[1] // 3), "num_patches": positions}
    if "num_attention_heads" not in config_fields:
        heads = {model["hidden_size"]: model["num_attention_heads"] for model in PUBLISHED.values()}
        fields["num_attention_heads"] = checkpoint.num_heads_by_width(kernel[0], heads)
    return fields


# Width, heads, layers, feed-forward width.
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 16, 24, 4096),
    "so400m": (1152, 16, 27, 4304),
    "giant-opt": (1536, 16, 40, 6144),
}
_VARIANTS = {
    "siglip2-base-patch16": "224 256 384 512 naflex",
    "siglip2-base-patch32": "256",
    "siglip2-large-patch16": "256 384 512",
    "siglip2-so400m-patch14": "224 384",
    "siglip2-so400m-patch16": "256 384 512 naflex",
    "siglip2-giant-opt-patch16": "256 384",
    "siglip-base-patch16": "224 256 384 512 256-multilingual",
    "siglip-large-patch16": "256 384",
    "siglip-so400m-patch14": "224 384",
    "siglip-so400m-patch16": "256-i18n",
}


def _published() -> dict[str, dict[str, Any]]:
    models = {}
    for model, variants in _VARIANTS.items():
        size, patch_size = model.split("-", 1)[1].split("-patch")
        for variant in variants.split():
            models[f"google/{model}-{variant}"] = {
                **size_fields(*_SIZES[size]),
                "patch_size": int(patch_size),
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
                "vision_use_head": True,
                **(
                    {"num_patches": 256}
                    if variant == "naflex"
                    else {"image_size": int(variant[:3]), "model_type": SiglipPackingConfig.model_type}
                ),
            }
    return models


PUBLISHED = _published()

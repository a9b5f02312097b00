"""CLIP's checkpoints: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

import math
from typing import Any

from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.metaclip_2.configuration_metaclip_2 import MetaClip2VisionConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.dialects.clip import OPEN_CLIP, TIMM, timm_head_projects
from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.open_clip_config import read_vision_cfg
from nopad.checkpoints.timm_config import PLAIN_VIT, is_timm, read_model_args
from nopad.families.sizes import configs_by_name, size_fields


class CLIPPackingConfig(CLIPVisionConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        with_projection: whether there is a projection into the image-text space.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: resample them as OpenCLIP and timm do, not as transformers does.
    """

    with_projection: bool = False
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


class MetaCLIP2PackingConfig(MetaClip2VisionConfig):
    """transformers' config of MetaCLIP 2, with the same fields; see `CLIPPackingConfig`."""

    with_projection: bool = False
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


CLIPConfigs = CLIPPackingConfig | MetaCLIP2PackingConfig


COMPOSITE = {"clip": CLIPPackingConfig, "metaclip_2": MetaCLIP2PackingConfig}
_CONFIG_CLASSES = {kind.model_type: kind for kind in COMPOSITE.values()}
_PROJECTING = ("CLIPModel", "CLIPVisionModelWithProjection", "MetaClip2Model", "MetaClip2VisionModelWithProjection")
_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
layer_norm_eps attention_dropout initializer_range initializer_factor projection_dim patch_order positions
positions_antialias
"""
_TIMM_ARCHITECTURES = r"vit_(base|large|huge|giant|gigantic)_patch(14|16|32)(_plus)?_clip(_quickgelu)?_(\d+)"
_TIMM_FIXED = {**PLAIN_VIT, "class_token": True, "pre_norm": True}
_KERNEL, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_PROJECTION, _FIRST = "visual_projection.weight", "encoder.layers.0"


def read_config(checkpoint: Checkpoint) -> CLIPConfigs:
    """The architecture: transformers' from its `config.json`, where what is absent is a default; OpenCLIP's and timm's
    from theirs and the tensors.

    Raises:
        ValueError: no config, from which alone the activation is known, or one that contradicts the tensors.
    """
    checkpoint.check_model_type(*COMPOSITE, *_CONFIG_CLASSES)
    outer, inner = checkpoint.config.get("model_type"), checkpoint.vision_config.get("model_type")
    config_class = _CONFIG_CLASSES.get(inner) or COMPOSITE.get(outer)  # pyright: ignore[reportArgumentType]
    fields = _read_config_json(checkpoint)
    if config_class is None:
        config_class = CLIPPackingConfig
        fields = {**_infer_from_tensors(checkpoint, fields), **fields}
    elif outer in COMPOSITE and "vision_config" in checkpoint.config:  # whose projection is the whole model's
        fields.pop("projection_dim", None)
        if "projection_dim" in checkpoint.config:
            fields["projection_dim"] = checkpoint.config["projection_dim"]
    if checkpoint.table in (OPEN_CLIP, TIMM):
        fields.setdefault("positions_antialias", True)
    architectures = checkpoint.config.get("architectures") or ()
    projecting = timm_head_projects(checkpoint.config) or not set(_PROJECTING).isdisjoint(architectures)
    with_projection = projecting or _PROJECTION in checkpoint.tensors
    return config_class(**fields, with_projection=with_projection)


def _read_config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `config.json`: transformers', OpenCLIP's or timm's."""
    if "model_cfg" in checkpoint.config:
        return read_vision_cfg(checkpoint)
    if not is_timm(checkpoint.config):
        return read_fields(checkpoint, _NAMES.split(), fixed={"dropout": 0.0}, unused=("with_projection",))
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=_TIMM_FIXED)
    heads = (14 if "_plus" in architecture else 12) if "_base_" in architecture else 16
    activation = "quick_gelu" if "_quickgelu" in architecture else "gelu"
    return {"hidden_act": activation, "num_attention_heads": heads} | fields


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, 4)
    number = checkpoint.shape(_POSITIONS, 2)[0] - 1
    side = math.isqrt(max(number, 0))
    label = f"checkpoint {checkpoint.name!r}"
    if side**2 != number or not side:
        raise ValueError(f"{label}: expected a square number of learned positions and one of CLS, got {number} + 1")
    if "hidden_act" not in config_fields:
        raise ValueError(
            f"{label}: no config says the activation, quick_gelu or gelu, which tensors do not show; add the "
            f"checkpoint's config.json or open_clip_config.json, or one with hidden_act"
        )
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.shape(f"{_FIRST}.mlp.fc1.bias", 1)[0],
        "num_hidden_layers": checkpoint.count("encoder.layers."),
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": side * patch_size,
    }
    if _PROJECTION in checkpoint.tensors:
        fields["projection_dim"] = checkpoint.shape(_PROJECTION, 2)[0]
    if "num_attention_heads" not in config_fields:
        heads = {width: heads for width, heads, *_ in _SIZES.values()}
        fields["num_attention_heads"] = checkpoint.num_heads_by_width(hidden_size, heads)
    return fields


# Width, heads, layers, feed-forward width, width of the image-text space.
_SIZES = {
    "B": (768, 12, 12, 3072, 512),
    "L": (1024, 16, 24, 4096, 768),
    "H": (1280, 16, 32, 5120, 1024),
    "g": (1408, 16, 40, 6144, 1024),
    "bigG": (1664, 16, 48, 8192, 1280),
}
# Size, patch, image, activation: names.
_MODELS = {
    ("B", 32, 224, "quick_gelu"): "openai/clip-vit-base-patch32 facebook/metaclip-b32-400m "
    "facebook/metaclip-b32-fullcc2.5b",
    ("B", 16, 224, "quick_gelu"): "openai/clip-vit-base-patch16 facebook/metaclip-b16-400m "
    "facebook/metaclip-b16-fullcc2.5b apple/DFN2B-CLIP-ViT-B-16",
    ("L", 14, 224, "quick_gelu"): "openai/clip-vit-large-patch14 facebook/metaclip-l14-400m "
    "facebook/metaclip-l14-fullcc2.5b apple/DFN2B-CLIP-ViT-L-14",
    ("L", 14, 336, "quick_gelu"): "openai/clip-vit-large-patch14-336",
    ("H", 14, 224, "quick_gelu"): "facebook/metaclip-h14-fullcc2.5b apple/DFN5B-CLIP-ViT-H-14 "
    "facebook/metaclip-2-worldwide-huge-quickgelu",
    ("H", 14, 378, "quick_gelu"): "apple/DFN5B-CLIP-ViT-H-14-378",
    ("B", 32, 224, "gelu"): "laion/CLIP-ViT-B-32-laion2B-s34B-b79K laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    ("B", 32, 256, "gelu"): "laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K",
    ("B", 16, 224, "gelu"): "laion/CLIP-ViT-B-16-laion2B-s34B-b88K laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    ("L", 14, 224, "gelu"): "laion/CLIP-ViT-L-14-laion2B-s32B-b82K laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
    ("H", 14, 224, "gelu"): "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ("g", 14, 224, "gelu"): "laion/CLIP-ViT-g-14-laion2B-s12B-b42K laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    ("bigG", 14, 224, "gelu"): "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k facebook/metaclip-2-worldwide-giant",
}


def _config(name: str, size: str, patch_size: int, image_size: int, activation_name: str) -> dict[str, Any]:
    *sizes, projection_dim = _SIZES[size]
    return {
        **size_fields(*sizes),
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": activation_name,
        "layer_norm_eps": 1e-5,
        "projection_dim": projection_dim,
        "with_projection": True,
        **({"model_type": MetaCLIP2PackingConfig.model_type} if "metaclip-2" in name else {}),
    }


PUBLISHED = configs_by_name(_MODELS, _config)

"""Checkpoints of plain vision transformers: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.ijepa.configuration_ijepa import IJepaConfig
from transformers.models.pixio.configuration_pixio import PixioConfig
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit_mae.configuration_vit_mae import ViTMAEConfig

from nopad.checkpoints.config_json import BACKBONE_FIELDS, read_fields
from nopad.checkpoints.dialects.vit import TIMM
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.checkpoints.timm_config import NAMES, PLAIN_VIT, check_is_timm, is_timm, read_model_args
from nopad.families.sizes import configs_by_name, size_fields


class ViTPackingConfig(ViTConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        with_pooler: whether a linear layer pools the CLS token.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: resample them as timm does, not as transformers does.
    """

    with_pooler: bool = False
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


class ViTMAEPackingConfig(ViTMAEConfig):
    """transformers' config of MAE's encoder, with the same fields; see `ViTPackingConfig`. Nothing is masked."""

    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


class IJepaPackingConfig(IJepaConfig):
    """transformers' config of I-JEPA, which has no CLS token, with the same fields; see `ViTPackingConfig`."""

    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


class PixioPackingConfig(PixioConfig):
    """transformers' config of Pixio, which has several CLS tokens, with the same fields; see `ViTPackingConfig`."""

    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


ViTConfigs = ViTPackingConfig | ViTMAEPackingConfig | IJepaPackingConfig | PixioPackingConfig
_CONFIG_CLASSES = {
    kind.model_type: kind for kind in (ViTPackingConfig, ViTMAEPackingConfig, IJepaPackingConfig, PixioPackingConfig)
}


def mlp_size(config: ViTConfigs) -> int:
    """Width of the feed-forward layers."""
    if isinstance(config, PixioPackingConfig):
        return config.hidden_size * config.mlp_ratio
    return config.intermediate_size


_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
layer_norm_eps attention_probs_dropout_prob initializer_range qkv_bias patch_order positions positions_antialias
"""
# Of one class alone; what is not about the pooler is about masked training, and kept for a saved config.
_OF_CLASSES = {
    "vit": ("pooler_act", "pooler_output_size", "encoder_stride"),
    "vit_mae": (
        "decoder_num_attention_heads",
        "decoder_hidden_size",
        "decoder_num_hidden_layers",
        "decoder_intermediate_size",
        "mask_ratio",
        "norm_pix_loss",
    ),
    "pixio": ("mlp_ratio", "n_cls_tokens", "drop_path_rate"),
}
_TIMM_ARCHITECTURES = r"(vit|deit)_(tiny|small|base|large|huge|giant|gigantic)_patch(8|14|16|32)_(\d+)(_in21k)?"
_TIMM_NAMES = {**NAMES, "attn_drop_rate": "attention_probs_dropout_prob"}
_TIMM_FIXED = {**PLAIN_VIT, "class_token": True}
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12}
_KERNEL, _POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
_CLS, _FIRST = "embeddings.cls_token", "layers.0"


def read_config(checkpoint: Checkpoint) -> ViTConfigs:
    """The architecture: transformers' from its `config.json`, where what is absent is a default, else from the tensors.

    Raises:
        ValueError: no `config.json`, and a width that no published model has, or timm's names.
    """
    checkpoint.check_model_type(*_CONFIG_CLASSES)
    config_class = _CONFIG_CLASSES.get(checkpoint.vision_config.get("model_type", ""))
    if is_timm(checkpoint.config):
        fields = _read_timm(checkpoint)
    else:
        names = [*_NAMES.split(), *_OF_CLASSES.get(getattr(config_class, "model_type", ""), ())]
        unused = ("with_pooler", *BACKBONE_FIELDS, *(name for names in _OF_CLASSES.values() for name in names))
        fields = read_fields(checkpoint, names, fixed={"hidden_dropout_prob": 0.0}, unused=unused)
    if config_class is None:
        config_class = _class_of_tensors(checkpoint)
        fields = {**_infer_from_tensors(checkpoint, fields, config_class), **fields}
    if config_class is ViTPackingConfig:
        fields["with_pooler"] = any(name.startswith("pooler.") for name in checkpoint.tensors)
        _check_pooler(checkpoint, fields)
    return config_class(**fields)


def _class_of_tensors(checkpoint: Checkpoint) -> type[ViTConfigs]:
    """The class of a checkpoint whose config does not name it.

    Raises:
        ValueError: timm's names of a model that timm has, without its config.
    """
    num_cls_tokens = checkpoint.shape(_CLS, ndim=3)[1] if _CLS in checkpoint.tensors else 0
    if num_cls_tokens > 1:
        return PixioPackingConfig
    if checkpoint.table is TIMM:
        check_is_timm(checkpoint)
    return ViTPackingConfig if num_cls_tokens else IJepaPackingConfig


def _check_pooler(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Raise `ValueError` on a pooled vector of another width than the tokens."""
    size, expected = fields.get("pooler_output_size"), fields.get("hidden_size", ViTPackingConfig.hidden_size)
    if size not in (None, expected):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: config.json: pooler_output_size: expected hidden_size {expected}, the "
            f"only one that is implemented, got {size!r:.80}"
        )


def _read_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields that timm's `config.json` has; see `read_model_args`."""
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=_TIMM_FIXED, names=_TIMM_NAMES)
    heads = _TIMM_HEADS.get(architecture.split("_")[1], 16)
    return {"num_attention_heads": heads, "layer_norm_eps": 1e-6, "positions_antialias": True} | fields


def _infer_from_tensors(
    checkpoint: Checkpoint, config_fields: dict[str, Any], config_class: type[ViTConfigs]
) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, ndim=4)
    num_cls_tokens = checkpoint.shape(_CLS, ndim=3)[1] if _CLS in checkpoint.tensors else 0
    num_positions = checkpoint.shape(_POSITIONS, ndim=3)[1] - num_cls_tokens
    width = checkpoint.shape(f"{_FIRST}.mlp.fc1.bias", 1)[0]
    is_pixio = config_class is PixioPackingConfig
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        **({"mlp_ratio": width // hidden_size, "n_cls_tokens": num_cls_tokens} if is_pixio else {}),
        **({} if is_pixio else {"intermediate_size": width}),
        "num_hidden_layers": checkpoint.count("layers."),
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": grid_side(num_positions, f"checkpoint {checkpoint.name!r}") * patch_size,
        "qkv_bias": any(name.endswith(".attention.q_proj.bias") for name in checkpoint.tensors),
    }
    if "num_attention_heads" not in config_fields:
        heads = {width: heads for width, heads, *_ in (_PIXIO_SIZES if is_pixio else _SIZES).values()}
        fields["num_attention_heads"] = checkpoint.num_heads_by_width(hidden_size, heads)
    return fields


# Width, heads, layers, feed-forward width.
_SIZES = {
    "tiny": (192, 3, 12, 768),
    "small": (384, 6, 12, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 16, 24, 4096),
    "huge": (1280, 16, 32, 5120),
    "giant": (1408, 16, 40, 6144),
}
# Width, heads, layers.
_PIXIO_SIZES = {
    "vitb16": (768, 12, 12),
    "vitl16": (1024, 16, 24),
    "vith16": (1280, 16, 32),
    "vit1b16": (1536, 24, 48),
    "vit5b16": (3072, 32, 48),
}
# Size, patch, image: names. Those with `in21k` have a pooler.
_MODELS = {
    ("tiny", 16, 224): "WinKawaks/vit-tiny-patch16-224",
    ("small", 16, 224): "WinKawaks/vit-small-patch16-224 facebook/dino-vits16",
    ("small", 8, 224): "facebook/dino-vits8",
    ("base", 8, 224): "facebook/dino-vitb8",
    ("base", 16, 224): "google/vit-base-patch16-224 google/vit-base-patch16-224-in21k facebook/dino-vitb16 "
    "facebook/vit-mae-base",
    ("base", 16, 384): "google/vit-base-patch16-384",
    ("base", 32, 224): "google/vit-base-patch32-224-in21k",
    ("base", 32, 384): "google/vit-base-patch32-384",
    ("large", 16, 224): "google/vit-large-patch16-224 google/vit-large-patch16-224-in21k facebook/vit-mae-large",
    ("large", 16, 384): "google/vit-large-patch16-384",
    ("large", 32, 224): "google/vit-large-patch32-224-in21k",
    ("large", 32, 384): "google/vit-large-patch32-384",
    ("huge", 14, 224): "google/vit-huge-patch14-224-in21k facebook/vit-mae-huge facebook/ijepa_vith14_1k "
    "facebook/ijepa_vith14_22k",
    ("huge", 16, 448): "facebook/ijepa_vith16_1k",
    ("giant", 16, 224): "facebook/ijepa_vitg16_22k",
}


def _config(name: str, size: str, patch_size: int, image_size: int) -> dict[str, Any]:
    kind = next((kind for kind in ("ijepa", "vit_mae") if kind.replace("_", "-") in name), None)
    return {
        **size_fields(*_SIZES[size]),
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6 if kind == "ijepa" else 1e-12,
        **({"with_pooler": True} if "in21k" in name else {}),
        **({"model_type": kind} if kind else {}),
    }


def _pixio_config(name: str, size: str) -> dict[str, Any]:
    hidden_size, num_heads, num_layers = _PIXIO_SIZES[size]
    return {
        "hidden_size": hidden_size,
        "mlp_ratio": 4,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_channels": 3,
        "image_size": 256,
        "patch_size": 16,
        "n_cls_tokens": 8,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "model_type": "pixio",
    }


_PIXIO_MODELS = {(size,): f"facebook/pixio-{size}" for size in _PIXIO_SIZES}
PUBLISHED = configs_by_name(_MODELS, _config) | configs_by_name(_PIXIO_MODELS, _pixio_config)

"""DINOv3's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

from nopad.checkpoints.config_json import BACKBONE_FIELDS, read_fields
from nopad.checkpoints.dialects.dinov3 import META_GATED, META_PLAIN, PERIODS, TIMM_GATED, TIMM_PLAIN
from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.timm_config import is_timm, read_model_args
from nopad.layers.rope import rope_periods


class DINOv3ViTPackingConfig(DINOv3ViTConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        untie_cls_norm: CLS and register tokens have a final norm of their own, as some of Meta's models do.
        pixel_statistics: of the images that it was trained on, `"imagenet"` (web images) or `"sat493m"` (satellite),
            `None` where that is unknown; a checkpoint's own preprocessor config wins.
        rope_periods: the `head size / 4` periods of rope, where they are not the powers of `rope_theta`: Meta's files
            hold them rounded to bfloat16, and Meta's model computes with those.
    """

    patch_order: str = "hwc"
    untie_cls_norm: bool = False
    pixel_statistics: str | None = None
    rope_periods: list[float] | None = None


_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout layer_norm_eps rope_theta query_bias key_bias value_bias proj_bias mlp_bias layerscale_value
drop_path_rate use_gated_mlp num_register_tokens pos_embed_shift pos_embed_jitter pos_embed_rescale initializer_range
patch_order untie_cls_norm pixel_statistics rope_periods
"""
_TIMM_NAMES = {
    "num_heads": "num_attention_heads",
    "attn_drop_rate": "attention_dropout",
    "drop_path_rate": "drop_path_rate",
    "rope_temperature": "rope_theta",
    "rope_shift_coords": "pos_embed_shift",
    "rope_jitter_coords": "pos_embed_jitter",
    "rope_rescale_coords": "pos_embed_rescale",
}
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 20, "7b": 32}
_TIMM_ARCHITECTURES = rf"vit_({'|'.join(_TIMM_HEADS)})(_plus)?_patch16_dinov3(_qkvb)?"
_TIMM_FIXED = {
    **dict.fromkeys(("class_token", "use_rot_pos_emb", "rope_rotate_half", "qkv_fused"), True),
    **dict.fromkeys(("use_abs_pos_emb", "use_post_norm", "use_pre_transformer_norm", "use_fc_norm"), False),
    **dict.fromkeys(("qk_norm", "scale_mlp", "scale_attn_inner", "attn_only_layer_scale", "dynamic_img_pad"), False),
    **dict.fromkeys(("num_kv_heads", "rope_mrope_section"), None),
    "use_post_transformer_norm": True,
    "rope_type": "dinov3",
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "attn_type": "eva",
}


def read_config(checkpoint: Checkpoint) -> DINOv3ViTPackingConfig:
    """The architecture, from tensors and `config.json`; Meta's files bring their rope and no config.

    Raises:
        ValueError: a part of the architecture that neither contains, or that is not implemented.
    """
    hidden_size, channels, *sides = checkpoint.shape("embeddings.patch_embeddings.weight", 4)
    has = {re.sub(r"^model\.layer\.\d+\.", "", name) for name in checkpoint.tensors}
    gated = "mlp.gate_proj.weight" in has
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": sides,
        "num_hidden_layers": checkpoint.count("model.layer."),
        "intermediate_size": checkpoint.shape("model.layer.0.mlp.up_proj.weight", 2)[0],
        "num_register_tokens": checkpoint.shape("embeddings.register_tokens", 3)[1],
        "proj_bias": "attention.o_proj.bias" in has,
        "mlp_bias": "mlp.up_proj.bias" in has,
        "use_gated_mlp": gated,
        "untie_cls_norm": "cls_norm.weight" in checkpoint.tensors,
        **{f"{name}_bias": f"attention.{name[0]}_proj.bias" in has for name in ("query", "key", "value")},
    }
    if DINOv3ViTPackingConfig.model_type not in _model_types(checkpoint):
        fields["hidden_act"] = "silu" if gated else "gelu"
    timm = checkpoint.table in (TIMM_PLAIN, TIMM_GATED)
    fields |= _from_timm(checkpoint) if timm and is_timm(checkpoint.config) else _from_transformers(checkpoint)
    if checkpoint.table in (META_PLAIN, META_GATED):
        inferred = _attention_of_meta(checkpoint, hidden_size)
        shared = inferred.keys() & checkpoint.vision_config
        different = {name: fields[name] for name in shared if fields[name] != inferred[name]}
        if different:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: config.json says {different}, but its tensors {inferred}"
            )
        fields |= inferred
    if "num_attention_heads" not in fields:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: the number of heads is known from config.json alone; add a "
            f"config.json with num_attention_heads"
        )
    return DINOv3ViTPackingConfig(**checkpoint.with_sides(fields))


def _model_types(checkpoint: Checkpoint) -> set[Any]:
    return {checkpoint.vision_config.get("model_type"), checkpoint.config.get("model_type")}


def _from_transformers(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of transformers' `config.json`."""
    checkpoint.check_model_type("dinov3_vit")
    return read_fields(checkpoint, _NAMES.split(), unused=BACKBONE_FIELDS)


def _from_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config of timm's `config.json`, whose models have the rope of the published ones."""
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=_TIMM_FIXED, names=_TIMM_NAMES)
    heads = _TIMM_HEADS[architecture.split("_")[1]]
    return {"num_attention_heads": heads, "pos_embed_rescale": None} | fields


def _attention_of_meta(checkpoint: Checkpoint, hidden_size: int) -> dict[str, Any]:
    """Heads, biases and rope, from the tensors that a Meta checkpoint has for them."""
    if PERIODS not in checkpoint.left_out:
        raise ValueError(f"checkpoint {checkpoint.name!r}: tensor {PERIODS!r} is missing; heads and rope follow it")
    periods = checkpoint.left_out[PERIODS].read()
    head_dim = 4 * len(periods)
    if hidden_size % head_dim:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: rope_periods of length {len(periods)} make heads {head_dim} wide, "
            f"which do not fill a width of {hidden_size}"
        )
    masks = {name: tensor for name, tensor in checkpoint.left_out.items() if name.endswith("bias_mask")}
    files = {checkpoint.table.file_name(name) for name in checkpoint.tensors}
    biases = {f"{name}_mask" for name in files if name.endswith("attn.qkv.bias")}
    if masks and biases != masks.keys():
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected an attn.qkv.bias_mask for each attn.qkv.bias or for none, "
            f"got only one of the two for {sorted(biases ^ masks.keys())[:10]}"
        )
    key_bias = bool(biases) and not masks
    for name, mask in masks.items():
        values = mask.read().float()
        if values.shape != (3 * hidden_size,) or not ((values == 0) | (values == 1)).all():
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: {name}: expected {3 * hidden_size} zeros and ones, got "
                f"{tuple(values.shape)} of {values.unique()[:10].tolist()}"
            )
        key_bias = key_bias or bool(values.chunk(3)[1].any())
    return {
        "num_attention_heads": hidden_size // head_dim,
        "query_bias": bool(biases),
        "key_bias": key_bias,
        "value_bias": bool(biases),
        **_rope(checkpoint.name, periods.float()),
    }


def _rope(name: str, periods: Tensor) -> dict[str, Any]:
    """The base of which `periods` are the powers; the periods themselves, too, where rounding has moved them."""
    if not (periods.isfinite() & (periods > 0)).all():
        raise ValueError(f"checkpoint {name!r}: {PERIODS}: expected finite numbers above 0, got {periods.tolist()}")
    num_periods = len(periods)
    base = float(periods[-1]) ** (num_periods / (num_periods - 1)) if num_periods > 1 else 100.0

    def near(tolerance: float) -> list[float]:
        powers = {
            theta: rope_periods(4 * num_periods, theta, "cpu") for theta in (100.0, round(base, 3), base) if theta > 0
        }
        return [theta for theta, each in powers.items() if torch.allclose(each, periods, rtol=tolerance, atol=0)]

    for theta in near(1e-6):
        return {"rope_theta": theta}
    return {"rope_theta": [*near(2**-8), base][0], "rope_periods": periods.tolist()}


def _published() -> dict[str, dict[str, Any]]:
    sizes = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, gated
        "vits16": (384, 12, 6, 1536, False),
        "vits16plus": (384, 12, 6, 1536, True),
        "vitb16": (768, 12, 12, 3072, False),
        "vitl16": (1024, 24, 16, 4096, False),
        "vith16plus": (1280, 32, 20, 5120, True),
        "vit7b16": (4096, 40, 32, 8192, True),
    }
    trained = [(size, "lvd1689m") for size in sizes] + [("vitl16", "sat493m"), ("vit7b16", "sat493m")]
    models = {}
    for size, images in trained:
        hidden_size, num_layers, num_heads, intermediate_size, gated = sizes[size]
        models[f"facebook/dinov3-{size}-pretrain-{images}"] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "intermediate_size": intermediate_size,
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else "gelu",
            "query_bias": size != "vit7b16",
            "key_bias": False,
            "value_bias": size != "vit7b16",
            "num_register_tokens": 4,
            "patch_size": 16,
            "num_channels": 3,
            "layer_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "pixel_statistics": "sat493m" if images == "sat493m" else "imagenet",
        }
    return models


PUBLISHED = _published()

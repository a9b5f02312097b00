"""DINOv3's checkpoints: the config, the dialects of tensor names, and the published models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

from nopad.checkpoints.conversions import ADD_AXIS, NameTable, Rename, split_rows
from nopad.checkpoints.formats import Checkpoint, Dialect, StoredTensor
from nopad.layers.rope import rope_periods


class DINOv3ViTPackingConfig(DINOv3ViTConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        untie_cls_norm: CLS and register tokens have a final norm of their own, as some of Meta's models do.
        pixel_statistics: of the images that it was trained on, `"imagenet"` (web images) or `"sat493m"` (satellite);
            a checkpoint's own preprocessor config wins.
        rope_periods: the `head size / 4` periods of rope, where they are not the powers of `rope_theta`: Meta's files
            hold them rounded to bfloat16, and Meta's model computes with those.
    """

    patch_order: str = "hwc"
    untie_cls_norm: bool = False
    pixel_statistics: str = "imagenet"
    rope_periods: list[float] | None = None


_LAYER = "model.layer.*"
_META_TABLE = (
    Rename("cls_token", "embeddings.cls_token"),
    Rename("storage_tokens", "embeddings.register_tokens"),
    Rename("mask_token", "embeddings.mask_token", reshape=ADD_AXIS),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.norm1.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.norm2.*"),
    Rename(
        "blocks.*.attn.qkv.weight",
        *(f"{_LAYER}.attention.{part}_proj.weight" for part in "qkv"),
        reshape=split_rows(3),
    ),
    Rename(  # the bias of keys is masked with zeros where the model has none
        "blocks.*.attn.qkv.bias",
        *(f"{_LAYER}.attention.{part}_proj.bias" for part in "qkv"),
        reshape=split_rows(3),
        optional=True,
    ),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.attention.o_proj.*"),
    Rename("blocks.*.ls1.gamma", f"{_LAYER}.layer_scale1.lambda1"),
    Rename("blocks.*.ls2.gamma", f"{_LAYER}.layer_scale2.lambda1"),
)
_META_PLAIN = NameTable(
    *_META_TABLE,
    Rename("blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.up_proj.*"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.down_proj.*"),
)
_META_GATED = NameTable(
    *_META_TABLE,
    Rename("blocks.*.mlp.w1.*", f"{_LAYER}.mlp.gate_proj.*"),
    Rename("blocks.*.mlp.w2.*", f"{_LAYER}.mlp.up_proj.*"),
    Rename("blocks.*.mlp.w3.*", f"{_LAYER}.mlp.down_proj.*"),
)

_BIAS_MASK, _PERIODS = r"^blocks\.\d+\.attn\.qkv\.bias_mask$", "rope_embed.periods"


def _mask_biases(checkpoint: Checkpoint) -> Checkpoint:
    """Meta's model multiplies the bias of queries, keys and values with a mask of zeros and ones."""

    def masked(bias: StoredTensor, mask: StoredTensor) -> StoredTensor:
        return replace(bias, read=lambda: bias.read() * mask.read().to(bias.dtype))

    biases = {name: f"{name}_mask" for name in checkpoint.tensors if f"{name}_mask" in checkpoint.left_out}
    products = {name: masked(checkpoint.tensors[name], checkpoint.left_out[mask]) for name, mask in biases.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **products})


_META: dict[str, Any] = {
    "signature": r"^(storage_tokens|rope_embed\.periods)$",
    "prepare": _mask_biases,
    # `local_cls_norm` is for the small crops of training alone; the others are read by `read_config`.
    "dropped": (_BIAS_MASK, r"^rope_embed\.periods$", r"^local_cls_norm\."),
}

DIALECTS = (
    # In memory, and in some files, the layers are `model.layer.i`.
    Dialect(
        "transformers",
        r"^layer\.\d+\.layer_scale1\.lambda1$",
        NameTable(Rename("layer.**", "model.layer.**")),
        prefixes=("model.",),
        is_original=True,
    ),
    Dialect("Meta", table=_META_PLAIN, excludes=(r"^blocks\.\d+\.mlp\.w1\.",), **_META),
    Dialect("Meta, gated", table=_META_GATED, excludes=(r"^blocks\.\d+\.mlp\.fc1\.",), **_META),
)

_CONFIG_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout layer_norm_eps rope_theta query_bias key_bias value_bias proj_bias mlp_bias layerscale_value
drop_path_rate use_gated_mlp num_register_tokens pos_embed_shift pos_embed_jitter pos_embed_rescale initializer_range
patch_order untie_cls_norm pixel_statistics rope_periods
"""


def read_config(checkpoint: Checkpoint) -> DINOv3ViTPackingConfig:
    """The architecture: Meta's, which brings its rope, from the tensors alone, transformers' from `config.json` too.

    Raises:
        ValueError: a part of the architecture that neither tells, or that no encoder here has.
    """
    meta = checkpoint.table in (_META_PLAIN, _META_GATED)
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
    }
    if "sat493m" in Path(checkpoint.name).name:
        fields["pixel_statistics"] = "sat493m"
    if meta:
        fields |= _attention_of_meta(checkpoint, hidden_size)
    else:
        checkpoint.check_model_type("dinov3_vit")
        fields |= {f"{name}_bias": f"attention.{name[0]}_proj.bias" in has for name in ("query", "key", "value")} | {
            name: value for name, value in checkpoint.config.items() if name in _CONFIG_NAMES.split()
        }
        if "num_attention_heads" not in fields:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: without config.json nothing tells the number of heads; add a "
                f"config.json with num_attention_heads"
            )
    if meta or not checkpoint.config:
        fields["hidden_act"] = "silu" if gated else "gelu"
    fields["patch_size"] = checkpoint.side("patch_size", fields["patch_size"])
    return DINOv3ViTPackingConfig(**fields)


def _attention_of_meta(checkpoint: Checkpoint, hidden_size: int) -> dict[str, Any]:
    """Heads, biases and rope, from the tensors that a Meta checkpoint has for them."""
    if _PERIODS not in checkpoint.left_out:
        raise ValueError(f"checkpoint {checkpoint.name!r}: tensor {_PERIODS!r} is missing; heads and rope follow it")
    periods = checkpoint.left_out[_PERIODS].read()
    head_dim = 4 * len(periods)
    if hidden_size % head_dim:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {len(periods)} rope periods make heads {head_dim} wide, "
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
        raise ValueError(f"checkpoint {name!r}: {_PERIODS}: expected finite numbers above 0, got {periods.tolist()}")
    number = len(periods)
    told = float(periods[-1]) ** (number / (number - 1)) if number > 1 else 100.0

    def near(tolerance: float) -> list[float]:
        powers = {base: rope_periods(4 * number, base, "cpu") for base in (100.0, round(told, 3), told) if base > 0}
        return [base for base, each in powers.items() if torch.allclose(each, periods, rtol=tolerance, atol=0)]

    for base in near(1e-6):
        return {"rope_theta": base}
    return {"rope_theta": [*near(2**-8), told][0], "rope_periods": periods.tolist()}


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

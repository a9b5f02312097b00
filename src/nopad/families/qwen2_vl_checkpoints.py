"""Qwen2-VL's and Qwen2.5-VL's checkpoints: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

from nopad.checkpoints.config_json import check_axial_rope, read_fields
from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count

_ATTRIBUTES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth", "num_channels": "in_channels"}


class Qwen2VLPackingConfig(Qwen2VLVisionConfig):
    """transformers' config and what packing adds to it; `hidden_size` is that of the language model.

    Attributes:
        patch_order: layout inside a patch.
    """

    attribute_map = _ATTRIBUTES
    patch_order: str = "chw"


class Qwen2_5_VLPackingConfig(Qwen2_5_VLVisionConfig):  # noqa: N801 - transformers' own name
    """transformers' config of Qwen2.5-VL, with the same field; see `Qwen2VLPackingConfig`."""

    attribute_map = _ATTRIBUTES
    patch_order: str = "chw"


Qwen2VLConfigs = Qwen2VLPackingConfig | Qwen2_5_VLPackingConfig

# `model_type` of configs whose towers are these: of a whole model, as published files have it, or of its tower.
_QWEN2 = ("qwen2_vl", "qwen2_vl_vision")
_QWEN2_5 = ("qwen2_5_vl", "qwen2_5_vl_vision")
_NAMES = """
depth hidden_size hidden_act num_heads in_channels patch_size spatial_merge_size temporal_patch_size rope_parameters
initializer_range patch_order
"""
_WINDOWS = ("window_size", "fullatt_block_indexes")
_NAMES_OF = {
    Qwen2VLPackingConfig: ("embed_dim", "mlp_ratio"),
    Qwen2_5_VLPackingConfig: ("intermediate_size", "out_hidden_size", *_WINDOWS),
}
# Of Qwen's own files; the second repeats `patch_size`, and the third is how a language model counts time.
_ALIASES, _UNUSED = {"in_chans": "in_channels"}, ("spatial_patch_size", "tokens_per_second")
_KERNEL, _GATE, _FC1 = "patch_embed.proj.weight", "blocks.0.mlp.gate_proj.weight", "blocks.0.mlp.fc1.weight"
_WIDTH, _HEADS, _DEPTH = 1280, 16, 32
"""Of all published models."""


def read_config(checkpoint: Checkpoint) -> Qwen2VLConfigs:
    """The architecture: from `config.json`, where what is absent is a default; without one from the tensors.

    Raises:
        ValueError: a config of another architecture, or none and sizes that no published model has.
    """
    checkpoint.check_model_type(*_QWEN2, *_QWEN2_5)
    model_type = checkpoint.vision_config.get("model_type", checkpoint.config.get("model_type"))
    is_2_5 = model_type in _QWEN2_5 or (model_type not in _QWEN2 and _GATE in checkpoint.tensors)
    config_class: Any = Qwen2_5_VLPackingConfig if is_2_5 else Qwen2VLPackingConfig
    names = [*_NAMES.split(), *_NAMES_OF[config_class]]
    fields = read_fields(checkpoint, names, aliases=_ALIASES, unused=_UNUSED)
    if model_type not in (*_QWEN2, *_QWEN2_5):
        fields = _infer_from_tensors(checkpoint, fields, is_2_5=is_2_5) | fields
    _check(checkpoint, fields)
    config = config_class(**fields)
    if is_2_5 and window_side(config) < 1:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: window_size: expected at least a block of {config.spatial_merge_size} × "
            f"{config.spatial_merge_size} patches of {config.patch_size} pixels, got {config.window_size!r:.80}"
        )
    return config


def window_side(config: Qwen2_5_VLPackingConfig) -> int:
    """Patches along a window: whole blocks that are merged."""
    size: Any = config.patch_size
    return config.window_size // config.spatial_merge_size // size * config.spatial_merge_size


def _check(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Raise `ValueError` on values that transformers' config does not check."""
    label = f"checkpoint {checkpoint.name!r}"
    check_axial_rope(checkpoint, fields.get("rope_parameters"))
    for name in ("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "embed_dim", "mlp_ratio"):
        if not is_count(fields.get(name, 1)):
            raise ValueError(f"{label}: {name}: expected an integer ≥ 1, got {fields[name]!r:.80}")
    indexes = fields.get("fullatt_block_indexes", ())
    if not isinstance(indexes, list | tuple) or not all(is_count(index, 0) for index in indexes):
        raise ValueError(f"{label}: fullatt_block_indexes: expected a list of layers, got {indexes!r:.80}")


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any], *, is_2_5: bool) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has.

    Raises:
        ValueError: no heads or windows, and another width or depth than those of the published models.
    """
    hidden_size, channels, frames, patch_size, _ = checkpoint.shape(_KERNEL, 5)
    out_size, merged = checkpoint.shape("merger.mlp.2.weight", 2)
    depth = checkpoint.count("blocks.")
    missing = [name for name in ("num_heads", *(_WINDOWS if is_2_5 else ())) if name not in config_fields]
    if missing and (hidden_size, depth) != (_WIDTH, _DEPTH):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: without config.json {' and '.join(missing)} are known for the published "
            f"models of {_DEPTH} layers of {_WIDTH}, but it has {depth} of {hidden_size}; add a config.json with them"
        )
    fields = {
        "depth": depth,
        "num_heads": _HEADS,
        "in_channels": channels,
        "patch_size": patch_size,
        "temporal_patch_size": frames,
        "spatial_merge_size": round((merged / max(hidden_size, 1)) ** 0.5),
    }
    if is_2_5:
        intermediate_size = checkpoint.shape(_GATE, 2)[0]
        sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "out_hidden_size": out_size}
    else:
        mlp_ratio = checkpoint.shape(_FC1, 2)[0] // max(hidden_size, 1)
        sizes = {"embed_dim": hidden_size, "mlp_ratio": mlp_ratio, "hidden_size": out_size}
    return fields | sizes


_SHARED = {
    "num_hidden_layers": _DEPTH,
    "num_attention_heads": _HEADS,
    "num_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
# Names by the width of the language model.
_QWEN2_VL = {1536: "2B 2B-Instruct", 3584: "7B 7B-Instruct", 8192: "72B 72B-Instruct"}
_QWEN2_5_VL = {
    (2048, 3420): "3B-Instruct",
    (3584, 3420): "7B-Instruct",
    (5120, 3456): "32B-Instruct",
    (8192, 3456): "72B-Instruct",
}


def _published() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = {}
    for out_size, names in _QWEN2_VL.items():
        fields = {**_SHARED, "embed_dim": _WIDTH, "hidden_size": out_size, "mlp_ratio": 4, "hidden_act": "quick_gelu"}
        models |= {f"Qwen/Qwen2-VL-{name}": fields for name in names.split()}
    for (out_size, intermediate_size), name in _QWEN2_5_VL.items():
        models[f"Qwen/Qwen2.5-VL-{name}"] = {
            **_SHARED,
            "model_type": Qwen2_5_VLPackingConfig.model_type,
            "hidden_size": _WIDTH,
            "intermediate_size": intermediate_size,
            "out_hidden_size": out_size,
            "hidden_act": "silu",
            "window_size": 112,
            "fullatt_block_indexes": (7, 15, 23, 31),
        }
    return models


PUBLISHED = _published()

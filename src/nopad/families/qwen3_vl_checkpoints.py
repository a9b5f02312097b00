"""Qwen3-VL's and Qwen3.5's checkpoints: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from nopad.checkpoints.config_json import check_axial_rope, read_fields
from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.timm_config import is_timm, read_model_args
from nopad.counts import is_count

# Those of `Qwen3VLVisionConfig`, by the names that all configs here have. transformers 5.17 has no name for the depth.
_ATTRIBUTES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth", "num_channels": "in_channels"}


class Qwen3VLPackingConfig(Qwen3VLVisionConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        positions: `"resample"`, which is what the model does for every image.
    """

    attribute_map = _ATTRIBUTES
    patch_order: str = "chw"
    positions: str = "resample"


class Qwen3_5PackingConfig(Qwen3_5VisionConfig):  # noqa: N801 - transformers' own name
    """transformers' config of Qwen3.5, with the same fields; see `Qwen3VLPackingConfig`."""

    attribute_map = _ATTRIBUTES
    patch_order: str = "chw"
    positions: str = "resample"


Qwen3VLConfigs = Qwen3VLPackingConfig | Qwen3_5PackingConfig

# `model_type` of configs whose towers are these: of a whole model, as published files have it, or of its tower.
_WITH_DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe", "cohere_compass")
_WITHOUT = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")
_NAMES = """
depth hidden_size hidden_act intermediate_size num_heads in_channels patch_size spatial_merge_size temporal_patch_size
out_hidden_size num_position_embeddings rope_parameters initializer_range patch_order positions
"""
_TIMM_ARCHITECTURES = r"qwen3_vit_(88m|306m|416m)(_enc|_merge)?"
_TIMM_NAMES = {
    "num_heads": "num_heads",
    "act_layer": "hidden_act",
    "merge_size": "spatial_merge_size",
    "rope_temperature": "rope_theta",
}
_TIMM_FIXED = {"norm_eps": 1e-6, "encoder_pool": "merge", "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
_INDEXES, _KERNEL = "deepstack_visual_indexes", "patch_embed.proj.weight"


def read_config(checkpoint: Checkpoint) -> Qwen3VLConfigs:
    """The architecture: from `config.json`, where what is absent is a default; without one from the tensors.

    Raises:
        ValueError: a config of another architecture, or none and a width that no published model has.
    """
    model_types = {f"{name}{part}" for name in (*_WITH_DEEPSTACK, *_WITHOUT) for part in ("", "_vision")}
    checkpoint.check_model_type(*sorted(model_types))
    model_type = checkpoint.vision_config.get("model_type", checkpoint.config.get("model_type"))
    deepstack = checkpoint.count("deepstack_merger_list.") > 0
    config_class: Any = Qwen3VLPackingConfig if deepstack else Qwen3_5PackingConfig
    if model_type in model_types:
        is_3_5 = model_type.removesuffix("_vision") in _WITHOUT
        config_class = Qwen3_5PackingConfig if is_3_5 else Qwen3VLPackingConfig
    if is_timm(checkpoint.config):
        fields = _read_timm(checkpoint)
    elif config_class is Qwen3VLPackingConfig:
        fields = read_fields(checkpoint, [*_NAMES.split(), _INDEXES])
    else:
        fields = read_fields(checkpoint, _NAMES.split(), fixed={_INDEXES: []})
    if model_type not in model_types:
        fields = _infer_from_tensors(checkpoint, fields, deepstack=deepstack) | fields
    _check(checkpoint, fields)
    return config_class(**fields)


def _read_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields that timm's `config.json` has; see `read_model_args`."""
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=_TIMM_FIXED, names=_TIMM_NAMES)
    if "rope_theta" in fields:
        fields["rope_parameters"] = {"rope_type": "axial", "rope_theta": fields.pop("rope_theta")}
    size = architecture.split("_")[2].upper()
    return {"num_heads": _SIZES[size][1]} | fields


def _check(checkpoint: Checkpoint, fields: dict[str, Any]) -> None:
    """Raise `ValueError` on values that transformers' config does not check."""
    label = f"checkpoint {checkpoint.name!r}"
    check_axial_rope(checkpoint, fields.get("rope_parameters"))
    for name in ("spatial_merge_size", "temporal_patch_size", "out_hidden_size", "num_position_embeddings"):
        if not is_count(fields.get(name, 1)):
            raise ValueError(f"{label}: {name}: expected an integer ≥ 1, got {fields[name]!r:.80}")
    indexes = fields.get(_INDEXES, ())
    if len({*indexes}) != len(indexes) or not all(is_count(index, 0) for index in indexes):
        raise ValueError(f"{label}: {_INDEXES}: expected different layers, got {indexes!r:.80}")
    limit = max(checkpoint.count("blocks."), checkpoint.count("deepstack_merger_list."))
    if len(indexes) > limit:
        raise ValueError(f"{label}: {_INDEXES}: got {len(indexes)}, but by its tensors it has at most {limit}")


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any], *, deepstack: bool) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, frames, patch_size, _ = checkpoint.shape(_KERNEL, 5)
    out_size, merged = checkpoint.shape("merger.linear_fc2.weight", 2)
    depth = checkpoint.count("blocks.")
    merge_size = round((merged / max(hidden_size, 1)) ** 0.5)
    fields: dict[str, Any] = {
        "depth": depth,
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.shape("blocks.0.mlp.linear_fc1.bias", 1)[0],
        "in_channels": channels,
        "patch_size": patch_size,
        "temporal_patch_size": frames,
        "spatial_merge_size": merge_size,
        "out_hidden_size": out_size,
        "num_position_embeddings": checkpoint.shape("pos_embed.weight", 2)[0],
    }
    published = {width: (heads, layers) for width, heads, _, _, layers in _SIZES.values()}
    missing = [name for name in ("num_heads", *[_INDEXES] * deepstack) if name not in config_fields]
    if missing and hidden_size not in published:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: without config.json {' and '.join(missing)} are known for the published "
            f"widths {sorted(published)}, but its width is {hidden_size}; add a config.json with them"
        )
    if missing:
        heads, layers = published[hidden_size]
        fields |= {"num_heads": heads, **({_INDEXES: list(layers)} if deepstack else {})}
    return fields


# Width, heads, depth, feed-forward width, DeepStack layers.
_SIZES = {
    "88M": (768, 12, 12, 3072, ()),
    "306M": (1024, 16, 24, 4096, (5, 11, 17)),
    "416M": (1152, 16, 27, 4304, (8, 16, 24)),
}
# Names by the size of the encoder and the width of the language model.
_QWEN3_VL = {
    ("306M", 2048): "VL-2B-Instruct VL-2B-Thinking VL-Embedding-2B VL-Reranker-2B",
    ("306M", 2560): "VL-4B-Instruct VL-4B-Thinking",
    ("416M", 4096): "VL-8B-Instruct VL-8B-Thinking VL-Embedding-8B VL-Reranker-8B VL-235B-A22B-Instruct "
    "VL-235B-A22B-Thinking",
    ("416M", 5120): "VL-32B-Instruct VL-32B-Thinking",
    ("416M", 2048): "VL-30B-A3B-Instruct VL-30B-A3B-Thinking",
}
_QWEN3_5 = {
    ("88M", 1024): "3.5-0.8B",
    ("306M", 2048): "3.5-2B",
    ("306M", 2560): "3.5-4B -Drive-1.0-4B",
    ("416M", 4096): "3.5-9B 3.5-397B-A17B",
    ("416M", 5120): "3.5-27B 3.8-27B",
    ("416M", 2048): "3.5-35B-A3B",
    ("416M", 2560): "3.8-Flash-Next",
    ("416M", 3072): "3.5-122B-A10B",
}


def _published() -> dict[str, dict[str, Any]]:
    models = {}
    for table, prefix in ((_QWEN3_VL, "Qwen/Qwen3-"), (_QWEN3_5, "Qwen/Qwen")):
        for (size, out_size), names in table.items():
            hidden_size, heads, depth, intermediate_size, layers = _SIZES[size]
            for name in names.split():
                models[prefix + name] = {
                    "hidden_size": hidden_size,
                    "intermediate_size": intermediate_size,
                    "num_hidden_layers": depth,
                    "num_attention_heads": heads,
                    "num_channels": 3,
                    "patch_size": 16,
                    "temporal_patch_size": 2,
                    "spatial_merge_size": 2,
                    "out_hidden_size": out_size,
                    "num_position_embeddings": 2304,
                    "hidden_act": "gelu_pytorch_tanh",
                    **({_INDEXES: layers} if table is _QWEN3_VL else {"model_type": Qwen3_5PackingConfig.model_type}),
                }
    return models


PUBLISHED = _published()

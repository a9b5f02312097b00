"""C-RADIO's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

import re
from typing import Any

from transformers.models.radio.configuration_radio import RadioConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.counts import is_count
from nopad.families.sizes import configs_by_name
from nopad.layers.positions import is_strict


class RadioPackingConfig(RadioConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        use_layer_scale: whether blocks have layer scales; transformers' always have, files may leave them out.
        normalize_pixels: whether pixels from 0 to 1 are normalised in the model; as a part of a larger model it takes
            normalised ones.
        positions_align_corners: resample positions with the corners of both grids aligned, as NVIDIA's code of some
            models does; transformers' does not.
        patch_order: layout inside a patch.
        positions: `"resample"`, which is what the model does for every image.
    """

    use_layer_scale: bool = True
    normalize_pixels: bool = True
    positions_align_corners: bool = False
    patch_order: str = "chw"
    positions: str = "resample"


_NAMES = """
hidden_size num_hidden_layers num_attention_heads mlp_ratio hidden_act layer_norm_eps attention_probs_dropout_prob
drop_path_rate use_swiglu_ffn qkv_bias layerscale_value num_channels patch_size max_img_size num_cls_tokens
num_registers summary_idxs norm_mean norm_std initializer_range use_layer_scale normalize_pixels
positions_align_corners patch_order positions
"""
# What NVIDIA's configs have beside the arguments of its training, and what transformers' does not compute with.
_UNUSED = """
args version max_resolution preferred_resolution adaptor_names adaptor_configs inter_feature_normalizer_config
image_size hidden_dropout_prob patch_dim video_patch_dim video_temporal_patch_size separate_video_embedder
"""
_FIXED = {"vitdet_window_size": None, "feature_normalizer_config": None}
_POSITIONS, _PROJECTION = "embeddings.position_embedding", "embeddings.patch_projection.weight"
_PREFIX, _FIRST = "embeddings.cls_register_token", "encoder.layer.0"
_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24}
_NOT_ALIGNED = r"c-radio_v3-[lg]|c-radio_v4.*"
"""Versions whose code resamples positions without aligned corners, as that of all others does with them."""


def read_config(checkpoint: Checkpoint) -> RadioPackingConfig:
    """The architecture: transformers' from its `config.json`, where what is absent is a default, else from the tensors.

    Raises:
        ValueError: a config of another architecture, or tensors that no published model has.
    """
    checkpoint.check_model_type("radio")
    fields = read_fields(checkpoint, _NAMES.split(), fixed=_FIXED, unused=_UNUSED.split())
    config = checkpoint.vision_config
    if "args" in config or config.get("model_type") != "radio":
        fields = {**_infer_from_tensors(checkpoint, config), **fields}
        if "num_attention_heads" not in fields:
            fields["num_attention_heads"] = checkpoint.num_heads_by_width(fields["hidden_size"], _HEADS)
    summary_idxs = _read_summary_idxs(checkpoint)
    if fields.get("summary_idxs", summary_idxs) not in (None, summary_idxs):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: summary_idxs: {fields['summary_idxs']!r:.80} in config.json and "
            f"{summary_idxs} in tensor {checkpoint.table.file_name('summary_idxs')!r}"
        )
    fields |= {
        "summary_idxs": summary_idxs,
        "use_layer_scale": any(".layer_scale" in name for name in checkpoint.tensors),
        "normalize_pixels": not checkpoint.prefix and fields.get("normalize_pixels", True),
    }
    return RadioPackingConfig(**fields)


def _read_summary_idxs(checkpoint: Checkpoint) -> list[int]:
    """Indices of the CLS tokens that make the pooled vector."""
    if not 0 < checkpoint.shape("summary_idxs", 1)[0] <= checkpoint.shape(_PREFIX, 2)[0]:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {checkpoint.table.file_name('summary_idxs')!r}: expected the index of at "
            f"least one CLS token and each once, got {checkpoint.shape('summary_idxs')[0]}"
        )
    return checkpoint.tensors["summary_idxs"].read().tolist()


def _infer_from_tensors(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors, and from the arguments in NVIDIA's `config.json`."""
    hidden_size, patch_dim = checkpoint.shape(_PROJECTION, 2)
    num_prefix_tokens = checkpoint.shape(_PREFIX, 2)[0]
    patch_size = grid_side(patch_dim // 3, f"checkpoint {checkpoint.name!r}: patches of three colours")
    positions = grid_side(checkpoint.shape(_POSITIONS, 3)[1], f"checkpoint {checkpoint.name!r}")
    num_cls_tokens = _num_cls_tokens(config.get("args") or {}) or 1 + max(_read_summary_idxs(checkpoint))
    version = config.get("version")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": checkpoint.count("encoder.layer."),
        "mlp_ratio": checkpoint.shape(f"{_FIRST}.mlp.fc1.weight", 2)[0] / hidden_size,
        "qkv_bias": f"{_FIRST}.attention.q_proj.bias" in checkpoint.tensors,
        "patch_size": patch_size,
        "max_img_size": positions * patch_size,
        "num_cls_tokens": num_cls_tokens,
        "num_registers": num_prefix_tokens - num_cls_tokens,
        "positions_align_corners": version is not None and not re.fullmatch(_NOT_ALIGNED, version),
    }


def _num_cls_tokens(args: dict[str, Any]) -> int | None:
    """Number of CLS tokens by the arguments of NVIDIA's training: one for each teacher, or one; `None` without them."""
    if "teachers" not in args:
        return None
    return len({teacher["name"] for teacher in args["teachers"]}) if args.get("cls_token_per_teacher", True) else 1


def check_config(config: RadioPackingConfig) -> None:
    """Check what transformers' config does not.

    Raises:
        ValueError: counts, indices or statistics that describe no model.
    """
    if is_strict(config.positions):
        raise ValueError("positions: C-RADIO resamples its own for every image, got 'strict'")
    for name, least in (("num_cls_tokens", 1), ("num_registers", 0), ("max_img_size", config.patch_size)):
        if not is_count(getattr(config, name), least):
            raise ValueError(f"{name}: expected an integer ≥ {least}, got {getattr(config, name)!r:.80}")
    indices = config.summary_idxs or []
    if not indices or not all(is_count(index, 0) and index < config.num_cls_tokens for index in indices):
        raise ValueError(
            f"summary_idxs: expected indices of {config.num_cls_tokens} CLS tokens, from 0, got {indices!r:.80}"
        )
    channels = config.num_channels
    for name in ("norm_mean", "norm_std"):
        if len(getattr(config, name)) != channels:
            raise ValueError(f"{name}: expected {channels} numbers, one a channel, got {getattr(config, name)!r:.80}")


_SIZES = {
    "B": (768, 12, 12, 4.0),
    "L": (1024, 24, 16, 4.0),
    "SO400M": (1152, 27, 16, 4304 / 1152),
    "H": (1280, 32, 16, 4.0),
    "g": (1536, 40, 24, 4.0),
}
"""`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `mlp_ratio`"""
_MODELS = {
    (3, "B"): "nvidia/C-RADIOv3-B",
    (3, "L"): "nvidia/C-RADIOv3-L",
    (3, "H"): "nvidia/C-RADIOv3-H",
    (3, "g"): "nvidia/C-RADIOv3-g",
    (4, "SO400M"): "nvidia/C-RADIOv4-SO400M",
    (4, "H"): "nvidia/C-RADIOv4-H",
}


def _config(name: str, version: int, size: str) -> dict[str, Any]:
    hidden_size, num_layers, num_heads, mlp_ratio = _SIZES[size]
    num_cls_tokens, num_registers = (4, 4) if version == 3 else (3, 7)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "patch_size": 16,
        "max_img_size": 2048,
        "num_cls_tokens": num_cls_tokens,
        "num_registers": num_registers,
        "summary_idxs": [*range(num_cls_tokens - 1)],  # all but SAM's
        "use_layer_scale": size in ("B", "L"),
        "positions_align_corners": version == 3 and size in ("B", "H"),
    }


PUBLISHED = configs_by_name(_MODELS, _config)

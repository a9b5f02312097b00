"""MoonViT's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig

from nopad.checkpoints.config_json import check_axial_rope, read_fields
from nopad.checkpoints.dialects.moonvit import MOONSHOT_HEADS
from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count
from nopad.layers.positions import is_strict

ROPE_THETA = 10_000.0
"""Base of the rotary frequencies of every published model, for files without a config."""


class MoonViTPackingConfig(Kimi_K25VisionConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        positions: `"resample"`, which is what the model does for every image.
    """

    num_channels = 3  # of all; no field of the config
    patch_order: str = "hwc"
    positions: str = "resample"


_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads patch_size hidden_act pos_emb_height pos_emb_width
pos_emb_time merge_kernel_size rope_parameters initializer_range patch_order positions
"""
# Moonshot's own config has other names, and fields of the projector to the language model.
_ALIASES = {
    **{f"init_pos_emb_{axis}": f"pos_emb_{axis}" for axis in ("height", "width", "time")},
    **{f"vt_{name}": name for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")},
}
_FIXED = {"merge_type": "sd2_tpool", "pos_emb_type": "divided_fixed", "video_attn_type": "spatial_temporal"}
_UNUSED = ("mm_hidden_size", "mm_projector_type", "projector_hidden_act", "projector_ln_eps", "text_hidden_size")
_KERNEL, _POSITIONS = "patch_embed.proj.weight", "patch_embed.pos_emb.position_embeddings"
_QUERIES = "layers.0.attn.q_proj.weight"


def read_config(checkpoint: Checkpoint) -> MoonViTPackingConfig:
    """The architecture: from `config.json`, where what is absent is a default; without one from the tensors.

    Raises:
        ValueError: a config of another architecture, or values that are not implemented.
    """
    checkpoint.check_model_type("kimi_k25", "kimi_k25_vision")
    fields = read_fields(checkpoint, _NAMES.split(), aliases=_ALIASES, fixed=_FIXED, unused=_UNUSED)
    if not checkpoint.vision_config:
        fields = _infer_from_tensors(checkpoint)
    check_axial_rope(checkpoint, fields.get("rope_parameters"))
    config = MoonViTPackingConfig(**fields)
    _check(checkpoint, config)
    return config


def _infer_from_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; all published models have as many heads."""
    hidden_size, _, patch_size, _ = checkpoint.shape(_KERNEL, 4)
    height, width, _ = checkpoint.shape(_POSITIONS, 3)
    return {
        "hidden_size": hidden_size,
        "patch_size": patch_size,
        "pos_emb_height": height,
        "pos_emb_width": width,
        "intermediate_size": checkpoint.shape("layers.0.mlp.fc1.bias", 1)[0],
        "num_hidden_layers": checkpoint.count("layers."),
        "num_attention_heads": MOONSHOT_HEADS,
    }


def _check(checkpoint: Checkpoint, config: MoonViTPackingConfig) -> None:
    """Raise `ValueError` on values that transformers' config does not check."""
    label, heads = f"checkpoint {checkpoint.name!r}", config.num_attention_heads
    if checkpoint.table.file_name(_QUERIES) != _QUERIES and heads != MOONSHOT_HEADS:
        raise ValueError(
            f"{label}: num_attention_heads: expected {MOONSHOT_HEADS} as in all published models under Moonshot's "
            f"names, got {heads}; save it under those of transformers"
        )
    if is_strict(config.positions):
        raise ValueError("positions: these checkpoints resample theirs for every image, got 'strict'")
    sides = [*config.merge_kernel_size]
    if len(sides) != 2 or sides[0] != sides[1] or not is_count(sides[0]):
        raise ValueError(f"{label}: merge_kernel_size: expected two equal integers ≥ 1, got {sides!r:.80}")
    for name in ("pos_emb_height", "pos_emb_width", "pos_emb_time"):
        if not is_count(getattr(config, name)):
            raise ValueError(f"{label}: {name}: expected an integer ≥ 1, got {getattr(config, name)!r:.80}")


_SIZES = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": MOONSHOT_HEADS,
    "patch_size": 14,
    "pos_emb_height": 64,
    "pos_emb_width": 64,
    "pos_emb_time": 4,
    "merge_kernel_size": (2, 2),
    "hidden_act": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "axial", "rope_theta": ROPE_THETA},
}
PUBLISHED = {f"moonshotai/Kimi-{name}": dict(_SIZES) for name in ("K2.5", "K2.6")}

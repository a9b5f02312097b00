"""Pixtral's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig

from nopad.checkpoints.config_json import check_axial_rope, read_fields
from nopad.checkpoints.dialects.pixtral import MISTRAL_HEADS
from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count

ROPE_THETA = 10_000.0
"""Base of the rotary frequencies of every published model, for files without a config."""


class PixtralPackingConfig(PixtralVisionConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        image_multiple: images are made with rows and columns of patches that are multiples of this: the side of the
            blocks that the language model around the encoder merges. The encoder itself takes any.
    """

    patch_order: str = "hwc"
    image_multiple: int = 1


_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout rope_parameters rope_theta initializer_range patch_order image_multiple
"""
_KERNEL, _GATE = "patch_conv.weight", "transformer.layers.0.feed_forward.gate_proj.weight"
_QUERIES = "transformer.layers.0.attention.q_proj.weight"


def read_config(checkpoint: Checkpoint) -> PixtralPackingConfig:
    """The architecture: from `config.json`, where what is absent is a default; without one from the tensors.

    Raises:
        ValueError: a config of another architecture, or heads that no rotary embedding over two axes fits.
    """
    checkpoint.check_model_type("pixtral")
    fields = read_fields(
        checkpoint,
        _NAMES.split(),
        aliases={"spatial_merge_size": "image_multiple"},
        unused=("head_dim", "is_composition", "vocab_size"),  # width over heads; not a field of an encoder alone
    )
    if checkpoint.vision_config.get("model_type") != PixtralPackingConfig.model_type:
        fields = _infer_from_tensors(checkpoint, fields) | fields
    theta = fields.pop("rope_theta", None)
    fields["rope_parameters"] = _rope_parameters(checkpoint, fields.get("rope_parameters"), theta)
    config = PixtralPackingConfig(**fields)
    _check(checkpoint, config)
    return config


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; all published models have as many heads."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, 4)
    return {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "intermediate_size": checkpoint.shape(_GATE, 2)[0],
        "num_hidden_layers": checkpoint.count("transformer.layers."),
        "num_attention_heads": MISTRAL_HEADS,
        "hidden_act": "silu",
    }


def _rope_parameters(checkpoint: Checkpoint, parameters: Any, theta: Any) -> dict[str, Any]:
    """As transformers 5 has them: older files have `rope_theta` beside them, and `"default"` for this one type.

    Raises:
        ValueError: another kind of rotary embedding, or a base that is no number above 0.
    """
    merged: Any = {"rope_theta": ROPE_THETA if theta is None else theta, "rope_type": "axial"}
    if parameters is not None:
        merged = {**merged, **parameters} if isinstance(parameters, dict) else parameters
    if isinstance(merged, dict) and merged["rope_type"] == "default":
        merged["rope_type"] = "axial"
    check_axial_rope(checkpoint, merged)
    return merged


def _check(checkpoint: Checkpoint, config: PixtralPackingConfig) -> None:
    """Raise `ValueError` on values that transformers' config does not check."""
    label, heads = f"checkpoint {checkpoint.name!r}", config.num_attention_heads
    head_dim = checkpoint.vision_config.get("head_dim")
    if head_dim not in (None, config.hidden_size // max(heads, 1)):
        raise ValueError(f"{label}: head_dim: expected hidden_size / num_attention_heads, got {head_dim!r:.80}")
    if checkpoint.table.file_name(_QUERIES) != _QUERIES and heads != MISTRAL_HEADS:
        raise ValueError(
            f"{label}: num_attention_heads: expected {MISTRAL_HEADS} as in all published models under Mistral's names, "
            f"got {heads}; save it under those of transformers"
        )
    if not is_count(config.image_multiple):
        raise ValueError(f"{label}: spatial_merge_size: expected an integer ≥ 1, got {config.image_multiple!r:.80}")


_BASE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_LARGE = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}
_MISTRAL_3 = {"patch_size": 14, "image_size": 1540, "image_multiple": 2}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "mistralai/Pixtral-12B-2409 mistral-community/pixtral-12b": {**_BASE, "patch_size": 16, "image_size": 1024},
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503 mistralai/Mistral-Small-3.2-24B-Instruct-2506": {
        **_BASE,
        **_MISTRAL_3,
    },
    "mistralai/Mistral-Large-3-675B-Instruct-2512": {**_LARGE, **_MISTRAL_3},
    "mistralai/Mistral-Large-4-1T-A52B": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 30,
        **_MISTRAL_3,
    },
    "lightonai/LightOnOCR-1B-1025": {**_BASE, **_MISTRAL_3},
}
_COMMON = {
    "num_attention_heads": MISTRAL_HEADS,
    "num_channels": 3,
    "hidden_act": "silu",
    "rope_parameters": {"rope_type": "axial", "rope_theta": ROPE_THETA},
}
PUBLISHED = {name: {**fields, **_COMMON} for names, fields in _PUBLISHED.items() for name in names.split()}

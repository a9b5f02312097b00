"""Mistral's `params.json`, which its own checkpoints have in place of `config.json`."""

from __future__ import annotations

from typing import Any

PARAMS = "params.json"
WEIGHTS = ("consolidated.safetensors", "consolidated.safetensors.index.json")
_VISION_FIELDS = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size rope_theta
spatial_merge_size
"""


def as_config(params: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `config.json` for the vision encoder of a `params.json`; `{}` where it has none.

    All other fields of `vision_encoder` are of the tokenizer and of the adapter to the language model.
    """
    encoder = params.get("vision_encoder")
    if not isinstance(encoder, dict):
        return {}
    fields = {name: encoder[name] for name in _VISION_FIELDS.split() if encoder.get(name) is not None}
    return {"vision_config": {"model_type": "pixtral", "hidden_act": "silu", **fields}}

"""How Perception Encoder takes texts, as CLIP does, and the sizes of its published text towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.open_clip_config import read_text_cfg
from nopad.families.clip_tokens import HIGHEST_TOKEN, check_tokenizer
from nopad.families.pe_checkpoints import PUBLISHED
from nopad.text.rules import TextRules

_HEAD_DIM = 64
"""Of all published text towers; no tensor has it."""
# Width, layers, tokens of a text.
_SIZES = {
    **dict.fromkeys(("T", "S"), (512, 12, 32)),
    **dict.fromkeys(("B", "L"), (1024, 24, 32)),
    "G": (1280, 24, 72),
}


def _fields(hidden_size: int, num_layers: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // _HEAD_DIM,
        "max_position_embeddings": length,
        "hidden_act": "gelu",
    }


def _published(name: str) -> dict[str, Any]:
    if not PUBLISHED[name]["use_head"]:
        raise ValueError(f"checkpoint 'untrained:{name}' has no text tower; of Perception Encoder, PE core has one")
    return _fields(*_SIZES[name.split("-")[2][0]])


def _config_fields(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Fields of the config of both towers: OpenCLIP's by transformers' names, or of Meta's file from its tensors.

    Raises:
        ValueError: a config that describes another tower, or a width that no published model has.
    """
    if "model_cfg" in checkpoint.config:
        fields, eos = read_text_cfg(checkpoint)
        if eos is not None:
            raise ValueError(f"checkpoint {checkpoint.name!r}: text_cfg: pool_type: expected 'argmax', got 'eos'")
        return {"text_config": {**fields, "eos_token_id": HIGHEST_TOKEN}}
    vocab_size, hidden_size = checkpoint.shape("text_model.embeddings.token_embedding.weight", 2)
    length = checkpoint.shape("text_model.embeddings.position_embedding.weight", 2)[0]
    if hidden_size % _HEAD_DIM:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: text tower: expected a width that heads of {_HEAD_DIM} fill, as in the "
            f"published models, got {hidden_size}"
        )
    fields = _fields(hidden_size, checkpoint.count("text_model.encoder.layers."), length)
    fields["intermediate_size"] = checkpoint.shape("text_model.encoder.layers.0.mlp.fc1.bias", 1)[0]
    return {"text_config": {**fields, "vocab_size": vocab_size, "eos_token_id": HIGHEST_TOKEN}}


TEXT_RULES = TextRules(
    padding="longest",
    published=_published,
    has_bos=True,
    config_fields=_config_fields,
    check_tokenizer=check_tokenizer,
    model_type="clip",
    tokenizer="openai/clip-vit-large-patch14",
)

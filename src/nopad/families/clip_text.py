"""How CLIP and MetaCLIP 2 take texts, and the sizes of their published text towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.open_clip_config import read_text_cfg
from nopad.families.clip_checkpoints import COMPOSITE, PUBLISHED, MetaCLIP2PackingConfig
from nopad.families.clip_tokens import HIGHEST_TOKEN, check_tokenizer
from nopad.text.rules import TextRules

# By the width of the image-text space: width, heads, layers. Those of 1,280 are bigG's.
_SIZES = {512: (512, 8, 12), 768: (768, 12, 12), 1024: (1024, 16, 24), 1280: (1280, 20, 32)}


def _published(name: str) -> dict[str, Any]:
    vision = PUBLISHED[name]
    hidden_size, num_heads, num_layers = _SIZES[vision["projection_dim"]]
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": 77,
        "hidden_act": vision["hidden_act"],
    }


def _config_fields(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Fields of the config of both towers: transformers' as it is, OpenCLIP's by transformers' names.

    Raises:
        ValueError: a config without the text tower, whose activation follows from no tensor.
    """
    if "model_cfg" in checkpoint.config:
        fields, eos = read_text_cfg(checkpoint)
        if eos is None:
            return {"text_config": {**fields, "eos_token_id": HIGHEST_TOKEN}}
        # transformers' CLIP takes this token for the highest, MetaCLIP 2 takes it as it is.
        model_type = MetaCLIP2PackingConfig.model_type.removesuffix("_vision_model")
        return {"model_type": model_type, "text_config": {**fields, "eos_token_id": eos}}
    if checkpoint.config.get("model_type") not in COMPOSITE:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: no config says the sizes and the activation of its text tower; add the "
            f"checkpoint's own config.json or open_clip_config.json"
        )
    return checkpoint.config


TEXT_RULES = TextRules(
    padding="longest",
    published=_published,
    has_bos=True,
    config_fields=_config_fields,
    check_tokenizer=check_tokenizer,
)

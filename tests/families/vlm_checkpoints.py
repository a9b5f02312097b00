"""Tiny models of transformers around a vision tower, each of the very class that its `model_type` stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aimv2_checkpoints import randomize
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.ovis2.modeling_ovis2 import Ovis2ForConditionalGeneration
from transformers.models.shieldgemma2.modeling_shieldgemma2 import ShieldGemma2ForImageClassification

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
SIGLIP = {**SIZES, "model_type": "siglip_vision_model", "image_size": 20, "vision_use_head": False}
SIGLIP2 = {**SIZES, "model_type": "siglip2_vision_model", "num_patches": 25, "vision_use_head": False}
CLIP = {**SIZES, "model_type": "clip_vision_model", "image_size": 20, "projection_dim": 16}
OVIS = {**SIZES, "model_type": "ovis2_vision", "image_size": 16, "vocab_size": 40, "hidden_stride": 2}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "head_dim": 8,
    "pad_token_id": 0,
}
# The tower, the text model, the path of the tower in the model, further fields.
KINDS: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "gemma3": (SIGLIP, "gemma3_text", "model.vision_tower", {}),
    "paligemma": (SIGLIP, "gemma", "model.vision_tower", {}),
    "shieldgemma2": (SIGLIP, "gemma3_text", "model.model.vision_tower", {}),
    "aya_vision": (SIGLIP, "cohere2", "model.vision_tower", {}),
    "cohere2_vision": (SIGLIP, "cohere2", "model.vision_tower", {}),
    "llava_onevision": (SIGLIP, "qwen2", "model.vision_tower", {}),
    "deepseek_vl": (SIGLIP, "llama", "model.vision_model", {}),
    "lfm2_vl": (SIGLIP2, "lfm2", "model.vision_tower", {}),
    "llava": (CLIP, "llama", "model.vision_tower", {}),
    "llava_next": (CLIP, "llama", "model.vision_tower", {}),
    "llava_next_video": (CLIP, "llama", "model.vision_tower", {}),
    "vipllava": (CLIP, "llama", "model.vision_tower", {"vision_feature_layers": [-2]}),
    "ovis2": (
        {**OVIS, "num_visual_indicator_tokens": 5},
        "qwen2",
        "model.vision_tower.transformer",
        {"vocab_size": 40, "hidden_size": 16, "visual_indicator_token_ids": [1, 2, 3, 4, 5]},
    ),
}
CLASSES = {"shieldgemma2": ShieldGemma2ForImageClassification, "ovis2": Ovis2ForConditionalGeneration}


def tiny_vlm(model_type: str, **vision: Any):
    """The model with random weights far from their init."""
    tower, text, _, more = KINDS[model_type]
    config = AutoConfig.for_model(
        model_type, vision_config={**tower, **vision}, text_config={**TEXT, "model_type": text}, **more
    )
    model = CLASSES[model_type](config) if model_type in CLASSES else AutoModelForImageTextToText.from_config(config)
    randomize(model)
    return model.eval()


def tower_of(model, model_type: str):
    """The vision tower of a model."""
    return model.get_submodule(KINDS[model_type][2])


def save(folder: Path, model_type: str, max_shard_size: str = "5GB", **vision: Any):
    """The model, saved by transformers."""
    model = tiny_vlm(model_type, **vision)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def with_a_head(folder: Path):
    """A SigLIP tower as transformers' own model, for comparison."""
    model = AutoModel.from_config(AutoConfig.for_model(**SIGLIP))
    randomize(model)
    model.eval().save_pretrained(folder)
    return model

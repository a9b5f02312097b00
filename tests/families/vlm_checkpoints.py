"""Tiny models of transformers around a vision tower, each of the very class that its `model_type` stands for."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from aimv2_checkpoints import randomize
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
SIGLIP = {**SIZES, "model_type": "siglip_vision_model", "image_size": 20, "vision_use_head": False}
SIGLIP2 = {**SIZES, "model_type": "siglip2_vision_model", "num_patches": 25, "vision_use_head": False}
CLIP = {**SIZES, "model_type": "clip_vision_model", "image_size": 20, "projection_dim": 16}
PIXTRAL = {**SIZES, "model_type": "pixtral", "image_size": 20, "hidden_act": "silu"}
MOONVIT = {
    "model_type": "kimi_k25_vision",
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "patch_size": 4,
    "pos_emb_height": 5,
    "pos_emb_width": 5,
    "merge_kernel_size": [1, 1],
}
RADIO = {
    "model_type": "radio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "max_img_size": 24,
    "video_temporal_patch_size": 2,
}
LARGE4 = {**PIXTRAL, "hidden_size": 128, "num_attention_heads": 16}  # in files under Mistral's names
OVIS = {**SIZES, "model_type": "ovis2_vision", "image_size": 16, "vocab_size": 40, "hidden_stride": 2}
TIPSV2 = {**SIZES, "model_type": "tipsv2_vision_model", "image_size": 20, "mlp_ratio": 1.5}
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 16,
    "num_position_embeddings": 25,
}
QWEN2 = {"depth": 2, "embed_dim": 32, "hidden_size": 16, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
QWEN2_5 = {
    **{name: value for name, value in QWEN.items() if name != "num_position_embeddings"},
    "model_type": "qwen2_5_vl_vision",
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
QWEN3_5 = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")
QWEN3_VL = {**QWEN, "deepstack_visual_indexes": [0]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
SAM = {
    "model_type": "sam_vision_model",
    "hidden_size": 16,
    "output_channels": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "mlp_dim": 16,
    "window_size": 2,
    "global_attn_indexes": [0],
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "head_dim": 8,
    **{f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}
# Of text models, where `TEXT` does not suffice.
TEXT_OF = {
    "tipsv2_text_model": {"hidden_size": 32},
    "qwen3_vl_moe_text": EXPERTS,
    "qwen3_5_moe_text": EXPERTS,
    "qwen4_exp_text": EXPERTS,
    "nemotron_h": {"hybrid_override_pattern": "*"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
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
    "deepseek_vl_hybrid": (SIGLIP, "llama", "model.vision_model", {"high_res_vision_config": SAM}),
    "modernvbert": (SIGLIP, "modernbert", "vision_model", {}),
    "colpali": (SIGLIP, "gemma", "vlm.vision_tower", {}),
    "t5gemma2": (SIGLIP, "", "model.encoder.vision_tower", {}),
    "lfm2_vl": (SIGLIP2, "lfm2", "model.vision_tower", {}),
    "llava": (CLIP, "llama", "model.vision_tower", {}),
    "llava_next": (CLIP, "llama", "model.vision_tower", {}),
    "llava_next_video": (CLIP, "llama", "model.vision_tower", {}),
    "vipllava": (CLIP, "llama", "model.vision_tower", {"vision_feature_layers": [-2]}),
    "mistral3": (PIXTRAL, "mistral", "model.vision_tower", {"spatial_merge_size": 2}),
    "mistral_large4": (LARGE4, "mistral_large4_text", "model.vision_tower", {"spatial_merge_size": 2}),
    "kimi_k25": (MOONVIT, "deepseek_v3", "model.vision_tower", {"projection_hidden_size": 128}),
    "nemotron_h_omni": (RADIO, "nemotron_h", "vision_model", {"vision_hidden_size": 32, "projector_hidden_size": 16}),
    "lighton_ocr": (PIXTRAL, "qwen3", "model.vision_encoder", {"spatial_merge_size": 2}),
    "tipsv2": (TIPSV2, "tipsv2_text_model", "vision_model", {}),
    "ovis2": (
        {**OVIS, "num_visual_indicator_tokens": 5},
        "qwen2",
        "model.vision_tower.transformer",
        {"vocab_size": 40, "hidden_size": 16, "visual_indicator_token_ids": [1, 2, 3, 4, 5]},
    ),
    "qwen2_vl": ({**QWEN2, "model_type": "qwen2_vl_vision"}, "qwen2_vl_text", "model.visual", {}),
    "qwen2_5_vl": (QWEN2_5, "qwen2_5_vl_text", "model.visual", {}),
    "hyperclovax_vision_v2": (QWEN2_5, "llama", "model.vision_model", {}),
    **{
        kind: ({**tower, "model_type": f"{kind}_vision"}, f"{kind}_text", "model.visual", {})
        for tower, kinds in ((QWEN3_VL, ("qwen3_vl", "qwen3_vl_moe", "cohere_compass")), (QWEN, QWEN3_5))
        for kind in kinds
    },
}
CLASSES = {
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "ovis2": "Ovis2ForConditionalGeneration",
    "tipsv2": "Tipsv2Model",
    "modernvbert": "ModernVBertModel",
    "colpali": "ColPaliForRetrieval",
    "t5gemma2": "T5Gemma2ForConditionalGeneration",
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
}
"""Classes that transformers does not find by the `model_type`, each in the module of that name."""


def config_of(model_type: str, vision: dict[str, Any]):
    """A config of the model around a tower."""
    tower, text, _, more = KINDS[model_type]
    tower = {**tower, **vision}
    if model_type == "t5gemma2":
        return AutoConfig.for_model(model_type, encoder={"vision_config": tower, "text_config": TEXT}, decoder=TEXT)
    if model_type == "colpali":
        return AutoConfig.for_model(model_type, vlm_config=config_of("paligemma", vision), embedding_dim=8)
    text_config = {**TEXT, **TEXT_OF.get(text, {}), "model_type": text}
    return AutoConfig.for_model(model_type, vision_config=tower, text_config=text_config, **more)


def tiny_vlm(model_type: str, **vision: Any):
    """The model with random weights far from their init."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    config = config_of(model_type, vision)
    if model_type in CLASSES:
        module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        model = getattr(module, CLASSES[model_type])(config)
    else:
        model = AutoModelForImageTextToText.from_config(config)
    randomize(model)
    return model.eval()


def tower_of(model, model_type: str):
    """The vision tower of a model."""
    if model_type == "colpali":  # whose part is PaliGemma with its head in some versions of transformers
        model.vlm = getattr(model.vlm, "model", model.vlm)
    return model.get_submodule(KINDS[model_type][2])


def save(folder: Path, model_type: str, max_shard_size: str = "5GB", **vision: Any):
    """The model, saved by transformers."""
    model = tiny_vlm(model_type, **vision)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model

"""Tiny CLIP checkpoints in every dialect, written by renaming tensors of transformers' own models one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from renaming import joined_qkv, renamed
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection
from transformers.models.metaclip_2.configuration_metaclip_2 import MetaClip2Config, MetaClip2VisionConfig
from transformers.models.metaclip_2.modeling_metaclip_2 import (
    MetaClip2Model,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
)

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 22,  # 5 × 5 patches and two pixels that no patch covers
    "patch_size": 4,
    "projection_dim": 24,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 30,
    "max_position_embeddings": 8,
    "projection_dim": 24,
}
CLASSES = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection),
    "metaclip2": (MetaClip2VisionConfig, MetaClip2VisionModel, MetaClip2VisionModelWithProjection),
}
COMPOSITES = {"clip": (CLIPConfig, CLIPModel), "metaclip2": (MetaClip2Config, MetaClip2Model)}


def tiny_original(kind: str = "clip", *, with_projection: bool = False, **changes):
    """transformers' vision model, with quick GELU unless `changes` say otherwise."""
    config_class, plain, projecting = CLASSES[kind]
    return _random((projecting if with_projection else plain)(config_class(**{**FIELDS, **changes})))


def composite(kind: str = "clip", *, text: dict | None = None, **changes):
    """The whole model of both towers."""
    config_class, model_class = COMPOSITES[kind]
    text_config = {**TEXT, **(text or {})}
    config = config_class(vision_config={**FIELDS, **changes}, text_config=text_config, projection_dim=24)
    return _random(model_class(config))


def _random(model):
    randomize(model)
    return model.eval()


def open_clip(original) -> dict[str, Tensor]:
    """OpenCLIP's names, of a model with a projection or of both towers."""
    table = [
        ("visual_projection.weight", "visual.proj"),
        ("text_projection.weight", "text_projection"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("text_model.final_layer_norm", "ln_final"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("layer_norm", "ln_"),
        ("self_attn.q_proj.", "attn.in_proj_"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ]
    state = {
        name: tensor.T.contiguous() if name.endswith("_projection.weight") else tensor
        for name, tensor in joined_qkv(original.state_dict()).items()
    }
    return {"logit_scale": torch.tensor(1.0), **renamed(state, table)}


def open_clip_config(original) -> dict:
    """What OpenCLIP's `open_clip_config.json` says of the same model."""
    config = getattr(original.config, "vision_config", original.config)
    text = getattr(original.config, "text_config", CLIPTextConfig(**TEXT))
    vision_cfg = {
        "image_size": config.image_size,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "head_width": config.hidden_size // config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "patch_size": config.patch_size,
    }
    return {
        "model_cfg": {
            "embed_dim": original.config.projection_dim,
            "quick_gelu": config.hidden_act == "quick_gelu",
            "vision_cfg": vision_cfg,
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "heads": text.num_attention_heads,
                "layers": text.num_hidden_layers,
                "mlp_ratio": text.intermediate_size / text.hidden_size,
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "interpolation": "bicubic"},
    }


def save(folder: Path, original) -> Path:
    return write(folder, dict(original.state_dict()), original.config.to_dict())


def run(original, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed tokens, pooled vector and normed CLS token of one image `(C, H, W)`."""
    output = original(pixel_values=image[None], interpolate_pos_encoding=True)
    tokens = original.post_layernorm(output.last_hidden_state[0])
    return tokens[1:], output.pooler_output[0], tokens[None, :1]

"""Tiny DINOv2 and TIPSv2 checkpoints in every dialect, written by renaming transformers' tensors one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from renaming import DINOV2_NAMES, since_5_18
from torch import Tensor
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersModel
from transformers.models.tipsv2.configuration_tipsv2 import Tipsv2VisionConfig
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionModel

GATED = {"use_swiglu_ffn": True, "mlp_ratio": 3}
VARIANTS = {
    "plain": {},
    "gated": GATED,
    "registers": {"num_register_tokens": 3},
    "gated, registers": {**GATED, "num_register_tokens": 2},
    "class with no registers": {"num_register_tokens": 0},
    "no biases of queries, keys and values": {"qkv_bias": False},
    "no mask token": {"use_mask_token": False},
    "tanh": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
}


def tiny_original(**changes) -> Dinov2Model | Dinov2WithRegistersModel:
    """Positions learned on 5 × 5 patches; with `num_register_tokens` the class that has them."""
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 20,
        "patch_size": 4,
        **changes,
    }
    if "num_register_tokens" in fields:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**fields))
    else:
        model = Dinov2Model(Dinov2Config(**fields))
    randomize(model)
    return model.eval()


def tiny_tipsv2(**changes) -> Tipsv2VisionModel:
    """Of one register and a width of feed-forward layers that is no multiple of the others'."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 1.5}
    model = Tipsv2VisionModel(Tipsv2VisionConfig(**{**sizes, "image_size": 20, "patch_size": 4, **changes}))
    randomize(model)
    return model.eval()


def in_memory(original) -> dict[str, Tensor]:
    """The names that transformers has in memory since 5.18."""
    return since_5_18(original.state_dict())


def published(original) -> dict[str, Tensor]:
    """The names of the published files."""
    named = {}
    state = original.state_dict()
    for name, tensor in state.items():
        if "up_proj" in name:
            continue
        if "gate_proj" in name:
            up = state[name.replace("gate_proj", "up_proj")]
            name, tensor = name.replace("gate_proj", "weights_in"), torch.cat((tensor, up))
        for new, old in DINOV2_NAMES.items():
            name = name.replace(new, old)
        named[name] = tensor
    return named


def meta(original) -> dict[str, Tensor]:
    """Meta's names."""
    table = [
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("attention.output.dense", "attn.proj"),
        ("mlp.weights_in", "mlp.w12"),
        ("mlp.weights_out", "mlp.w3"),
        ("layernorm.", "norm."),
    ]
    named = {}
    state = published(original)
    for name, tensor in state.items():
        if ".key." in name or ".value." in name:
            continue
        if ".query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("attention.attention.query", "attn.qkv"), torch.cat(parts)
        for old, new in table:
            name = name.replace(old, new)
        named[name] = tensor
    return named


def tipsv2(original) -> dict[str, Tensor]:
    """The names by which transformers saves TIPSv2."""
    table = [("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")]
    named = {}
    for name, tensor in meta(original).items():
        for old, new in table:
            name = name.replace(old, new)
        named[name] = tensor
    return named


def save(folder: Path, original, dialect=published) -> Path:
    return write(folder, dialect(original), original.config.to_dict())

"""Tiny DINOv3 checkpoints in every dialect, written by renaming tensors of transformers' own model one by one."""

from __future__ import annotations

from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from torch import Tensor
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTModel

GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
VARIANTS = {
    "plain": {},
    "gated": GATED,
    "key bias": {"key_bias": True},
    "no qkv bias": {**GATED, "query_bias": False, "value_bias": False},
    "value bias alone": {"query_bias": False},
    "no biases, no registers": {
        **{f"{name}_bias": False for name in ("query", "value", "proj", "mlp")},
        "num_register_tokens": 0,
    },
    "another base": {"rope_theta": 40.0, "num_attention_heads": 2},
}


def tiny_original(**changes) -> DINOv3ViTModel:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 4,
        "num_register_tokens": 2,
    }
    model = DINOv3ViTModel(DINOv3ViTConfig(**{**fields, **changes})).eval()
    randomize(model)
    return model


def in_memory(original: DINOv3ViTModel) -> dict[str, Tensor]:
    """Layers under the names that the model has in memory, `model.layer.i`."""
    return {
        name if not name.startswith("layer.") else f"model.{name}": tensor
        for name, tensor in original.state_dict().items()
    }


def on_disk(original: DINOv3ViTModel) -> dict[str, Tensor]:
    """Layers under the names that published files have, `layer.i`."""
    return {name.removeprefix("model."): tensor for name, tensor in original.state_dict().items()}


def save(folder: Path, original: DINOv3ViTModel, dialect=on_disk) -> Path:
    return write(folder, dialect(original), original.config.to_dict())


_META_NAMES = [
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "storage_tokens"),
    ("embeddings.patch_embeddings", "patch_embed.proj"),
    ("layer.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
]


def meta(original: DINOv3ViTModel) -> dict[str, Tensor]:
    """transformers' tensors under Meta's names, with all that Meta's files have besides."""
    config = original.config
    state = on_disk(original)
    table = list(_META_NAMES)
    if config.use_gated_mlp:
        table += [("mlp.gate_proj", "mlp.w1"), ("mlp.up_proj", "mlp.w2"), ("mlp.down_proj", "mlp.w3")]
    else:
        table += [("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2")]
    named = {}
    for name, tensor in state.items():
        if any(part in name for part in ("q_proj", "k_proj", "v_proj")):
            continue
        for old, new in table:
            name = name.replace(old, new, 1) if name.startswith(old) or not old.endswith("layer.") else name
        named[name] = tensor
    named["mask_token"] = named["mask_token"][0]
    size = config.hidden_size
    for i in range(config.num_hidden_layers):
        parts = [f"layer.{i}.attention.{part}_proj" for part in "qkv"]
        named[f"blocks.{i}.attn.qkv.weight"] = torch.cat([state[f"{part}.weight"] for part in parts])
        if config.query_bias:
            # Where the mask is zero, anything may lie.
            keys = state.get(f"{parts[1]}.bias", torch.full((size,), 7.0))
            biases = (state[f"{parts[0]}.bias"], keys, state[f"{parts[2]}.bias"])
            named[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
            if not config.key_bias:
                mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(size)
                named[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    pairs = size // config.num_attention_heads // 2
    named["rope_embed.periods"] = config.rope_theta ** (2 * torch.arange(pairs // 2) / pairs)
    named["local_cls_norm.weight"], named["local_cls_norm.bias"] = torch.rand(size), torch.rand(size)
    return named


def save_meta(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path

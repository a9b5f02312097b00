"""Tiny ViT, MAE, I-JEPA and Pixio checkpoints, written by renaming tensors of transformers' own models one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from aimv2_checkpoints import randomize, write
from renaming import joined_qkv, renamed
from torch import Tensor
from transformers.models.ijepa.configuration_ijepa import IJepaConfig
from transformers.models.ijepa.modeling_ijepa import IJepaModel
from transformers.models.pixio.configuration_pixio import PixioConfig
from transformers.models.pixio.modeling_pixio import PixioModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTModel
from transformers.models.vit_mae.configuration_vit_mae import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModel

FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 22,  # 5 × 5 patches and two pixels that no patch covers
    "patch_size": 4,
}
CLASSES = {
    "vit": (ViTConfig, ViTModel),
    "vit_mae": (ViTMAEConfig, ViTMAEModel),
    "ijepa": (IJepaConfig, IJepaModel),
    "pixio": (PixioConfig, PixioModel),
}


def tiny_original(kind: str = "vit", *, pooler: bool = True, **changes):
    """transformers' model; MAE masks nothing, and ViT has its pooler unless told otherwise."""
    config_class, model_class = CLASSES[kind]
    masks = {"mask_ratio": 0.0} if kind == "vit_mae" else {}
    arguments = {"add_pooling_layer": pooler} if kind == "vit" else {}
    fields = {**FIELDS, **masks, **changes}
    if kind == "pixio":
        del fields["intermediate_size"]  # which follows the width
        fields = {"mlp_ratio": 2, "n_cls_tokens": 3, **fields}
    model = model_class(config_class(**fields), **arguments)
    randomize(model)
    return model.eval()


def in_memory(original) -> dict[str, Tensor]:
    """The names that transformers has in memory."""
    return dict(original.state_dict())


def published(original) -> dict[str, Tensor]:
    """The names of the published files, of Pixio those of files that transformers saves."""
    table = [
        ("layers.", "encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    ]
    if isinstance(original, PixioModel):
        table = [*table, ("layernorm_before", "norm1"), ("layernorm_after", "norm2")]
    return renamed(original.state_dict(), table)


def meta(original) -> dict[str, Tensor]:
    """Meta's names of Pixio, which are timm's."""
    table = [
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.cls_token", "cls_token"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.q_proj", "attn.qkv"),
        ("attention.o_proj", "attn.proj"),
        ("layers.", "blocks."),
        ("layernorm.", "norm."),
    ]
    return renamed(joined_qkv(original.state_dict()), table)


def save(folder: Path, original, dialect=published) -> Path:
    return write(folder, dialect(original), original.config.to_dict())


def arguments(original, pixels: Tensor) -> dict[str, Any]:
    """Those of the original for one image `(C, H, W)`; MAE orders patches by its noise."""
    size = original.config.patch_size
    noise = torch.arange(pixels.shape[1] // size * (pixels.shape[2] // size))[None]
    masks = {"noise": noise} if isinstance(original, ViTMAEModel) else {}
    if isinstance(original, PixioModel):
        return {"pixel_values": pixels[None]}
    return {"pixel_values": pixels[None], "interpolate_pos_encoding": True, **masks}


def run(original, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Patch tokens `(T, D)`, the pooled vector `(D,)` and the CLS token `(1, 1, D)` of one image `(C, H, W)`."""
    number = getattr(original.config, "n_cls_tokens", 1 - isinstance(original, IJepaModel))
    output = original(**arguments(original, pixels))
    tokens, pooled = output.last_hidden_state[0], getattr(output, "pooler_output", None)
    if number and pooled is None:
        pooled = tokens[:1]
    return tokens[number:], None if pooled is None else pooled[0], tokens[None, :number] if number else None

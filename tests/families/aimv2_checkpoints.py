"""Tiny AIMv2 checkpoints in every dialect, written by renaming tensors of transformers' own model one by one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.aimv2.configuration_aimv2 import Aimv2Config, Aimv2TextConfig, Aimv2VisionConfig
from transformers.models.aimv2.modeling_aimv2 import Aimv2Model, Aimv2VisionModel


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights far from their init, so that any two swapped tensors show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(noise * scale + (1.0 if parameter.ndim == 1 else 0.0))


def tiny_config(**changes) -> Aimv2VisionConfig:
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 20,
        "patch_size": 4,
        "use_head": False,
        "is_native": True,
    }
    return Aimv2VisionConfig(**{**fields, **changes})


def tiny_original(**changes) -> Aimv2VisionModel:
    model = Aimv2VisionModel(tiny_config(**changes)).eval()
    randomize(model)
    return model


def tiny_composite(text: dict | None = None, **changes) -> Aimv2Model:
    vision = tiny_config(use_head=True, is_native=False, **changes)
    fields = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 30,
        "max_position_embeddings": 8,
    }
    text_config = Aimv2TextConfig(**{**fields, **(text or {})})
    config = Aimv2Config(vision_config=vision.to_dict(), text_config=text_config.to_dict(), projection_dim=12)
    model = Aimv2Model(config).eval()
    randomize(model)
    return model


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name


def apple(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under Apple's names."""
    table = [
        ("embeddings.patch_embed", "preprocessor.patchifier.proj"),
        ("embeddings.rms_norm", "preprocessor.patchifier.norm"),
        ("encoder.layers", "trunk.blocks"),
        ("rms_norm1", "norm_1"),
        ("rms_norm2", "norm_2"),
        ("attention.out_proj", "attn.proj"),
        ("ffn.gate_proj", "mlp.fc1"),
        ("ffn.up_proj", "mlp.fc3"),
        ("ffn.down_proj", "mlp.fc2"),
    ]
    return _fused(state, table, "trunk.post_trunk_norm.weight", "preprocessor.pos_embed")


def timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under timm's names."""
    table = [
        ("embeddings.patch_embed", "patch_embed.proj"),
        ("embeddings.rms_norm", "patch_embed.norm"),
        ("encoder.layers", "blocks"),
        ("rms_norm", "norm"),
        ("attention.out_proj", "attn.proj"),
        ("ffn.gate_proj", "mlp.fc1_g"),
        ("ffn.up_proj", "mlp.fc1_x"),
        ("ffn.down_proj", "mlp.fc2"),
    ]
    return _fused(state, table, "norm.weight", "pos_embed")


def _fused(state, table, last_norm, positions) -> dict[str, Tensor]:
    named = {}
    for name, tensor in state.items():
        if name == "rms_norm.weight":
            named[last_norm] = tensor
        elif name == "embeddings.position_embedding.weight":
            named[positions] = tensor[None]
        elif ".q_proj." in name:
            key, value = (state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            fused = _renamed(name, table).replace("attention.q_proj", "attn.qkv")
            named[fused] = torch.cat((tensor, key, value))
        elif ".k_proj." not in name and ".v_proj." not in name:
            named[_renamed(name, table)] = tensor
    return named


def early(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under the names of its early remote code."""
    table = [("out_proj", "proj_out"), ("gate_proj", "fc1"), ("down_proj", "fc2"), ("up_proj", "fc3")]
    return {_renamed(name, table): tensor for name, tensor in state.items()}


def write(folder: Path, state: dict[str, Tensor], config: dict | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def flat_config(original: Aimv2VisionModel) -> dict:
    """Apple's flat config, which says neither native nor head."""
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
        "rms_norm_eps attention_dropout qkv_bias"
    )
    config = {name: getattr(original.config, name) for name in names.split()}
    return {**config, "model_type": "aimv2", "use_bias": original.config.mlp_bias, "projection_dropout": 0.0}

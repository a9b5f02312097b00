"""Tiny C-RADIO encoders of transformers, their checkpoints under NVIDIA's names, and how they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aimv2_checkpoints import randomize, write
from renaming import joined_qkv, renamed, since_5_18
from torch import Tensor
from transformers.models.radio.configuration_radio import RadioConfig
from transformers.models.radio.modeling_radio import RadioModel


def tiny_original(**changes) -> RadioModel:
    """Positions learned on 6 × 6 patches, three CLS tokens of which the first and the last are the summary."""
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "mlp_ratio": 1.5,
        "patch_size": 4,
        "max_img_size": 24,
        "num_registers": 2,
        "summary_idxs": [0, 2],
        **changes,
    }
    model = RadioModel(RadioConfig(**fields)).eval()
    randomize(model)
    return model


def save(folder: Path, original: RadioModel) -> Path:
    """The folder that transformers writes."""
    original.save_pretrained(folder)
    return folder


def run(original: RadioModel, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch tokens `(T, D)`, the summary, and CLS and register tokens `(1, number, D)` of one image `(C, H, W)`."""
    output = original(pixels[None])
    number = original.config.num_summary_tokens
    return output.features[0], output.summary[0], output.last_hidden_state[:, :number]


def nvidia(original: RadioModel, *, scales: bool = True) -> dict[str, Tensor]:
    """NVIDIA's names, with or without layer scales."""
    table = [
        ("embeddings.patch_projection", "radio_model.model.patch_generator.embedder"),
        ("embeddings.video_patch_projection", "radio_model.model.patch_generator.video_embedder"),
        ("embeddings.position_embedding", "radio_model.model.patch_generator.pos_embed"),
        ("embeddings.cls_register_token", "radio_model.model.patch_generator.cls_token.token"),
        ("encoder.layer.", "radio_model.model.blocks."),
        ("attention.q_proj", "attn.qkv"),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.grandma"),
        ("layer_scale2.lambda1", "ls2.grandma"),
        ("input_conditioner.", "radio_model.input_conditioner."),
        ("summary_idxs", "radio_model.summary_idxs"),
    ]
    state = since_5_18(original.state_dict())
    state = {name: tensor for name, tensor in state.items() if scales or "layer_scale" not in name}
    return renamed(joined_qkv(state), table)


def nvidia_config(original: RadioModel, version: str = "c-radio_v4-h", **args) -> dict[str, Any]:
    """What NVIDIA's `config.json` says of a model, among the arguments of its training."""
    config = original.config
    teachers = [
        {"name": f"teacher {index}", "use_summary": index in config.summary_idxs}
        for index in range(config.num_cls_tokens)
    ]
    return {
        "adaptor_configs": {},
        "adaptor_names": None,
        "architectures": ["RADIOModel"],
        "args": {"amp": True, "cls_token_per_teacher": True, "teachers": [*teachers, teachers[0]], **args},
        "auto_map": {"AutoConfig": "hf_model.RADIOConfig", "AutoModel": "hf_model.RADIOModel"},
        "feature_normalizer_config": None,
        "inter_feature_normalizer_config": None,
        "max_resolution": config.max_img_size,
        "patch_size": config.patch_size,
        "preferred_resolution": [512, 512],
        "torch_dtype": "float32",
        "version": version,
        "vitdet_window_size": None,
    }


def save_nvidia(folder: Path, original: RadioModel, version: str = "c-radio_v4-h", *, scales: bool = True) -> Path:
    return write(folder, nvidia(original, scales=scales), nvidia_config(original, version))

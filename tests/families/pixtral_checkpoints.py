"""Tiny Pixtral encoders of transformers, and their checkpoints under Mistral's names, written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from aimv2_checkpoints import randomize, write
from torch import Tensor
from transformers.models.pixtral.configuration_pixtral import PixtralVisionConfig
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

HEADS = 16  # of all models under Mistral's names


def tiny_original(**changes) -> PixtralVisionModel:
    fields = {
        "hidden_size": 128,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "image_size": 20,
        "patch_size": 4,
        "hidden_act": "silu",
    }
    model = PixtralVisionModel(PixtralVisionConfig(**{**fields, **changes})).eval()
    randomize(model)
    return model


def save(folder: Path, original: PixtralVisionModel) -> Path:
    """The folder that transformers writes."""
    original.save_pretrained(folder)
    return folder


def mistral(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under Mistral's names, with the rows of queries and keys in Mistral's order."""
    table = {
        **{f"attention.{part}_proj": f"attention.w{part}" for part in "qkvo"},
        "feed_forward.gate_proj": "feed_forward.w1",
        "feed_forward.down_proj": "feed_forward.w2",
        "feed_forward.up_proj": "feed_forward.w3",
    }
    named = {}
    for name, tensor in state.items():
        if "q_proj" in name or "k_proj" in name:
            size = len(tensor) // HEADS
            rows = [
                head * size + half * size // 2 + i for head in range(HEADS) for i in range(size // 2) for half in (0, 1)
            ]
            tensor = tensor[torch.tensor(rows)]
        for old, new in table.items():
            name = name.replace(old, new)
        named[name] = tensor
    return named


def write_consolidated(folder: Path, original: PixtralVisionModel, **params) -> Path:
    """A whole model as Mistral publishes it: `consolidated.safetensors` and `params.json`."""
    state = {f"vision_encoder.{name}": tensor for name, tensor in mistral(original.state_dict()).items()}
    others = ("tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "norm.weight")
    others += ("vision_language_adapter.w_in.weight", "patch_merger.merging_layer.weight")
    write(folder, {**state, **{name: torch.ones(4, 4) for name in others}}, None)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size"
    encoder = {name: getattr(original.config, name) for name in names.split()}
    encoder |= {"rope_theta": original.config.rope_parameters["rope_theta"], "image_token_id": 10, **params}
    (folder / "params.json").write_text(json.dumps({"dim": 4, "n_layers": 1, "vision_encoder": encoder}))
    return folder

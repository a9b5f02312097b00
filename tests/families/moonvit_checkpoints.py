"""Tiny MoonViT encoders of transformers, their checkpoints under Moonshot's names, and how they run."""

from __future__ import annotations

from pathlib import Path

import torch
from aimv2_checkpoints import randomize
from torch import Tensor
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25VisionModel

import nopad

HEADS = 16  # of all models under Moonshot's names


def tiny_original(**changes) -> Kimi_K25VisionModel:
    """Positions learned on 5 × 5 patches and for 4 frames; blocks of one, of others grids are multiples."""
    fields = {
        "hidden_size": 128,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "patch_size": 4,
        "pos_emb_height": 5,
        "pos_emb_width": 5,
        "merge_kernel_size": [1, 1],
    }
    model = Kimi_K25VisionModel(Kimi_K25VisionConfig(**{**fields, **changes})).eval()
    randomize(model)
    return model


def save(folder: Path, original: Kimi_K25VisionModel) -> Path:
    """The folder that transformers writes."""
    original.save_pretrained(folder)
    return folder


def run(original: Kimi_K25VisionModel, pixels: Tensor) -> Tensor:
    """Tokens `(t · h · w, D)` of one image `(C, H, W)` or clip `(frames, C, H, W)`."""
    size = original.config.patch_size
    patches, grid = nopad.patchify(pixels, size, "chw")
    patches = patches.view(-1, 3, size, size).to(original.dtype)
    return original(patches, grid_thw=torch.tensor([grid])).last_hidden_state


def moonshot(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors under Moonshot's names, with the rows of queries and keys in Moonshot's order."""
    named = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            size = len(tensor) // HEADS
            order = [
                head * size + half * size // 2 + i for head in range(HEADS) for i in range(size // 2) for half in (0, 1)
            ]
            key, value = (state[name.replace("q_proj", other)] for other in ("k_proj", "v_proj"))
            fused = torch.cat((tensor[torch.tensor(order)], key[torch.tensor(order)], value))
            named[name.replace("layers", "encoder.blocks").replace("attn.q_proj", "wqkv")] = fused
        elif "layers." in name and "k_proj" not in name and "v_proj" not in name:
            table = {"norm1": "norm0", "norm2": "norm1", "fc1": "fc0", "fc2": "fc1", "attn.proj": "wo"}
            (old,) = (each for each in table if f".{each}." in name)
            named[name.replace("layers", "encoder.blocks").replace(old, table[old])] = tensor
        elif "layers." not in name:
            name = name.replace("pos_emb.position_embeddings", "pos_emb.weight")
            named[name.replace("final_layernorm", "encoder.final_layernorm")] = tensor
    return named

"""Tiny OneVision-Encoder checkpoints in both dialects, and the plain reference's outputs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from onevision_original import PlainConfig, PlainOneVision
from safetensors.torch import save_file


def tiny_original(**changes):
    """The plain reference with weights far from their init, so that any two swapped tensors show."""
    model = PlainOneVision(PlainConfig(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.normal_(generator=generator).mul_(scale).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def write(folder: Path, state, config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def hub(state):
    return dict(state)


def preview(state):
    """Preview v0's names: one matrix for queries, keys and values."""
    out = {}
    for name, tensor in state.items():
        if name == "embeddings.patch_embedding.weight":
            out["patch_embed.proj.weight"] = tensor
        elif "self_attn.q_proj" in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[name.replace("q_proj", "qkv")] = torch.cat(parts)
        elif "self_attn.out_proj" in name:
            out[name.replace("out_proj", "proj")] = tensor
        elif "self_attn" not in name:
            out[name] = tensor
    return out


def positions_of(grid, frame_numbers=None):
    frames, rows, columns = grid
    numbers = torch.arange(frames) if frame_numbers is None else torch.as_tensor(frame_numbers)
    return torch.cartesian_prod(numbers, torch.arange(rows), torch.arange(columns))


def run(original, pixels, positions=None):
    """The reference's tokens and pooled vector, `None` without a head, of one image or one whole clip."""
    if pixels.ndim == 3:
        output = original(pixels[None])
    else:
        size = original.config.patch_size
        grid = (pixels.shape[0], pixels.shape[2] // size, pixels.shape[3] // size)
        positions = positions_of(grid) if positions is None else positions
        output = original(pixels.transpose(0, 1)[None], patch_positions=positions[None])
    pooled = output.pooler_output
    return output.last_hidden_state[0], None if pooled is None else pooled[0]

"""Tiny Qwen3-VL and Qwen3.5 vision encoders of transformers, and how they run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from aimv2_checkpoints import randomize
from torch import Tensor
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 96,  # bitsandbytes packs multiples of 32 on processors with AVX512-BF16
    "num_position_embeddings": 25,
}
DEEPSTACK = [2, 0]
"""DeepStack layers, in another order than the layers."""
_NAMES = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}


def tiny_original(kind: str = "qwen3_vl", **changes) -> Qwen3VLVisionModel | Qwen3_5VisionModel:
    """Positions learned on 5 × 5 patches."""
    fields = {**SIZES, **{_NAMES.get(name, name): value for name, value in changes.items()}}
    if kind == "qwen3_5":
        model = Qwen3_5VisionModel(Qwen3_5VisionConfig(**fields))
    else:
        layers = [layer for layer in DEEPSTACK if layer < fields["depth"]]
        model = Qwen3VLVisionModel(Qwen3VLVisionConfig(**{"deepstack_visual_indexes": layers, **fields}))
    randomize(model)
    return model.eval()


def save(folder: Path, original) -> Path:
    """The folder that transformers writes."""
    original.save_pretrained(folder)
    return folder


class Output(NamedTuple):
    """What an original makes of one image or clip.

    Attributes:
        tokens: `(t · h · w, D)`, row by row.
        merged: `(t · h · w / m², E)`.
        deepstack: the same of each DeepStack layer.
    """

    tokens: Tensor
    merged: Tensor
    deepstack: tuple[Tensor, ...]


def blocks_of(pixels: Tensor, config) -> tuple[Tensor, list[int]]:
    """Patches of an image or clip and its grid, by the steps of transformers' Qwen3VLVideoProcessor."""
    clip, size, merge = pixels if pixels.ndim == 4 else pixels[None], config.patch_size, config.spatial_merge_size
    while len(clip) % config.temporal_patch_size:
        clip = torch.cat((clip, clip[-1:]))
    times, rows, columns = len(clip) // config.temporal_patch_size, clip.shape[2] // size, clip.shape[3] // size
    shape = (times, config.temporal_patch_size, 3, rows // merge, merge, size, columns // merge, merge, size)
    patches = clip.reshape(shape).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(times * rows * columns, -1), [times, rows, columns]


def run(original, pixels: Tensor) -> Output:
    """One image `(C, H, W)` or clip `(frames, C, H, W)`."""
    patches, grid = blocks_of(pixels, original.config)
    output = original(patches, grid_thw=torch.tensor([grid]))
    tokens = by_rows(output.last_hidden_state, grid, original.config.spatial_merge_size)
    return Output(tokens, output.pooler_output, tuple(getattr(output, "deepstack_features", None) or ()))


def by_rows(tokens: Tensor, grid: list[int], merge: int) -> Tensor:
    """Tokens in the order of their blocks, row by row."""
    times, rows, columns = grid
    blocks = tokens.reshape(times, rows // merge, columns // merge, merge, merge, -1)
    return blocks.permute(0, 1, 3, 2, 4, 5).flatten(0, 4)

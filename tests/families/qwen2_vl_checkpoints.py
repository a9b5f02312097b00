"""Tiny Qwen2-VL and Qwen2.5-VL vision encoders of transformers, and how they run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from aimv2_checkpoints import randomize
from qwen3_vl_checkpoints import blocks_of, by_rows
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

SIZES = {"depth": 3, "num_heads": 4, "patch_size": 4}
QWEN2 = {**SIZES, "embed_dim": 32, "hidden_size": 96, "mlp_ratio": 2}  # multiples of 32, as for Qwen3-VL
QWEN2_5 = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "out_hidden_size": 96,
    "window_size": 16,  # 2 × 2 blocks of 2 × 2 patches
    "fullatt_block_indexes": [1],
}
CLASSES = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
}
_NAMES = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}


def tiny_original(kind: str = "qwen2_5_vl", **changes):
    """Windows of 4 × 4 patches in the first and the last of three layers; in Qwen2-VL none."""
    changes = {_NAMES.get(name, name): value for name, value in changes.items()}
    if kind == "qwen2_5_vl":
        model = CLASSES[kind](Qwen2_5_VLVisionConfig(**{**QWEN2_5, **changes}))
    else:
        if "hidden_size" in changes:  # that of the tower in tests of all families
            changes["embed_dim"] = changes.pop("hidden_size")
        changes.pop("intermediate_size", None)  # which follows the width
        model = CLASSES[kind](Qwen2VLVisionConfig(**{**QWEN2, **changes}))
    randomize(model)
    return model.eval()


class Output(NamedTuple):
    """What an original makes of one image or clip.

    Attributes:
        tokens: `(t · h · w, D)`, row by row.
        merged: `(t · h · w / m², E)`.
    """

    tokens: Tensor
    merged: Tensor


def run(original, pixels: Tensor) -> Output:
    """One image `(C, H, W)` or clip `(frames, C, H, W)`."""
    patches, grid = blocks_of(pixels, original.config)
    output = original(patches, grid_thw=torch.tensor([grid]))
    return Output(to_rows(original, output.last_hidden_state, grid), output.pooler_output)


def to_rows(original, tokens: Tensor, grid: list[int]) -> Tensor:
    """Tokens as a layer has them, row by row."""
    merge = original.config.spatial_merge_size
    if hasattr(original.config, "window_size"):
        order = window_order(grid, merge, original.config.window_size // original.config.patch_size // merge)
        tokens = tokens.unflatten(0, (-1, merge**2))[torch.tensor(order).argsort()].flatten(0, 1)
    return by_rows(tokens, grid, merge)


def window_order(grid: list[int], merge: int, side: int) -> list[int]:
    """Blocks row by row, in the order of windows of `side` × `side` blocks."""
    times, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    return [
        (time * rows + row) * columns + column
        for time in range(times)
        for top in range(0, rows, side)
        for left in range(0, columns, side)
        for row in range(top, min(top + side, rows))
        for column in range(left, min(left + side, columns))
    ]

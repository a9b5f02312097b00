"""The references of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from nopad.align.references.blocks import BlocksReference
from nopad.encoder import PackedEncoder
from nopad.families.qwen2_vl_checkpoints import Qwen2_5_VLPackingConfig, window_side


class Qwen2VLReference(BlocksReference):
    """transformers' Qwen2-VL and Qwen2.5-VL, whose blocks of tokens are window by window."""

    model_class = Qwen2VisionTransformerPretrainedModel

    def class_of(self, packed: PackedEncoder) -> type[PreTrainedModel]:
        """The class that reads the same checkpoint."""
        is_2_5 = isinstance(packed.config, Qwen2_5_VLPackingConfig)
        return Qwen2_5_VisionTransformerPretrainedModel if is_2_5 else Qwen2VisionTransformerPretrainedModel

    def block_order(self, config: Any, grid: list[int]) -> Tensor | None:
        """See `BlocksReference`."""
        if not hasattr(config, "window_size"):
            return None
        merge_size = config.spatial_merge_size
        frames, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
        side = window_side(config) // merge_size
        blocks = torch.arange(frames * rows * columns).view(frames, rows, columns)
        windows = [
            window.flatten() for frame in blocks for band in frame.split(side) for window in band.split(side, dim=1)
        ]
        return torch.cat(windows)


REFERENCE = Qwen2VLReference()

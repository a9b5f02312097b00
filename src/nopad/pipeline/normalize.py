"""Grey levels of a pack to the values that an encoder takes, on its own device."""

from __future__ import annotations

import torch
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.patches import PatchOrder
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import level_values


class Normalizer:
    """Rescales, normalises and casts patches, all images of a pack at once.

    A grey level of a colour always becomes the same value, so the values come from a table of 3 × 256 that is made as
    `preprocess` makes them: they are equal bit for bit, on every device.

    Args:
        rule: with the rescale factor and the statistics.
        patch_order: layout inside a patch.
        device, dtype: of the values.
    """

    def __init__(self, rule: Preprocessing, patch_order: PatchOrder, device: torch.device, dtype: torch.dtype) -> None:
        self.patch_order = patch_order
        self.table = level_values(rule).to(dtype).to(device)

    def __call__(self, patches: Tensor) -> Tensor:
        """`(T, P)` on the device of the table; patches that are values already, not uint8, are returned as they are."""
        if patches.dtype != torch.uint8:
            return patches
        if has_triton(patches.device):
            from nopad.kernels.triton_levels import look_up

            return look_up(patches, self.table, self.patch_order == "hwc")
        channels = torch.arange(3, device=patches.device)
        size = patches.shape[1] // 3
        channel = channels.repeat(size) if self.patch_order == "hwc" else channels.repeat_interleave(size)
        return torch.take(self.table, patches.long().add_(channel * 256))

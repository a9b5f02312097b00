"""From patches to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 8
"""Values of half precision in 16 bytes."""


class PatchEmbedding(nn.Module):
    """A linear map from patches to tokens, with the weight of the convolution that it stands for.

    A GPU's fast GEMMs take rows of whole 16 bytes, which 14 × 14 pixels of three colours in half precision are not:
    there patches and weight get zeros behind each row.

    Args:
        channels: C.
        hidden_size: D.
        patch_size: side of a patch in pixels, p.
        order: layout inside a patch.
        bias: whether there is one.
    """

    def __init__(self, channels: int, hidden_size: int, patch_size: int, order: str, *, bias: bool = True):
        super().__init__()
        self.order = order
        self.weight = nn.Parameter(torch.empty(hidden_size, channels, patch_size, patch_size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size)) if bias else None)

    def forward(self, patches: Tensor) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        weight = (self.weight.permute(0, 2, 3, 1) if self.order == "hwc" else self.weight).flatten(1)
        if patches.is_cuda and patches.dtype != torch.float32:
            patches, weight = aligned(patches), aligned(weight)
        return F.linear(patches, weight, self.bias)


def aligned(rows: Tensor) -> Tensor:
    """`(M, K)` with zeros behind each row up to a multiple of `ALIGNMENT`."""
    missing = -rows.shape[1] % ALIGNMENT
    return F.pad(rows, (0, missing)) if missing else rows


def reorder_patches(patches: Tensor, patch_size: int, source: str, target: str) -> Tensor:
    """Patches `(T, P)` of one layout in another."""
    if source == target:
        return patches
    if source == "chw":
        return patches.unflatten(1, (-1, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)
    return patches.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)

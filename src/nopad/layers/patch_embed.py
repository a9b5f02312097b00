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
        missing = -patches.shape[1] % ALIGNMENT if patches.is_cuda and patches.dtype != torch.float32 else 0
        if missing:
            patches = F.pad(patches, (0, missing))
        return F.linear(patches, self.matrix(patches.shape[1]), self.bias)

    def matrix(self, columns: int) -> Tensor:
        """The weight as `(D, columns)` over patches in `order`, with zeros where `columns` are more than P."""
        kernel = self.weight.permute(0, 2, 3, 1) if self.order == "hwc" else self.weight
        values = kernel[0].numel()
        if columns == values:
            return kernel.flatten(1)
        matrix = kernel.new_zeros(len(kernel), columns)
        matrix[:, :values].view(kernel.shape).copy_(kernel)
        return matrix


def reorder_patches(patches: Tensor, patch_size: int, source: str, target: str) -> Tensor:
    """Patches `(T, P)` of one layout in another."""
    if source == target:
        return patches
    if source == "chw":
        return patches.unflatten(1, (-1, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)
    return patches.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)

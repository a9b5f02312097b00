"""Patch embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.kernels.gemm_formats import HALF_ALIGNMENT


class PatchEmbedding(nn.Module):
    """A linear layer from patches to tokens, with the weight of the convolution that it replaces.

    Fast GPU GEMMs need rows of a multiple of 16 bytes. Patches of 14 × 14 × 3 values in half precision are not, so
    patches and weight are padded with zeros there.

    Args:
        channels: C.
        hidden_size: D.
        patch_size: side of a patch in pixels.
        order: order of the values in a patch, see `PatchOrder`.
        temporal_patch_size: frames of a patch, where the convolution is three-dimensional; else `None`.
        bias: whether the layer has a bias.
    """

    def __init__(
        self,
        channels: int,
        hidden_size: int,
        patch_size: int,
        order: str,
        *,
        temporal_patch_size: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.order = order
        frames = () if temporal_patch_size is None else (temporal_patch_size,)
        self.weight = nn.Parameter(torch.empty(hidden_size, channels, *frames, patch_size, patch_size))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(hidden_size)) if bias else None)

    def forward(self, patches: Tensor) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        padding = -patches.shape[1] % HALF_ALIGNMENT if patches.is_cuda and patches.dtype != torch.float32 else 0
        if padding:
            patches = F.pad(patches, (0, padding))
        return F.linear(patches, self.matrix(patches.shape[1]), self.bias)

    def matrix(self, columns: int) -> Tensor:
        """The weight as `(D, columns)` over patches in `order`, padded with zeros beyond P columns."""
        kernel = self.weight.movedim(1, -1) if self.order == "hwc" else self.weight
        patch_dim = kernel[0].numel()
        if columns == patch_dim:
            return kernel.flatten(1)
        matrix = kernel.new_zeros(len(kernel), columns)
        matrix[:, :patch_dim].view(kernel.shape).copy_(kernel)
        return matrix


def reorder_patches(patches: Tensor, patch_size: int, source: str, target: str) -> Tensor:
    """Patches `(T, P)` whose values are in `source` order, in `target` order; each is `"hwc"` or `"chw"`."""
    if source == target:
        return patches
    if source == "chw":
        return patches.unflatten(1, (-1, patch_size, patch_size)).permute(0, 2, 3, 1).flatten(1)
    return patches.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).flatten(1)

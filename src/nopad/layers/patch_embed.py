"""From patches to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 8
"""Values of half precision in 16 bytes."""


class PatchEmbedding(nn.Linear):
    """A linear map from patches to tokens.

    A GPU's fast products take rows of whole 16 bytes, which 14 × 14 pixels of three colours in half precision are not:
    there patches and weight get zeros behind each row.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`(T, P)` to `(T, D)`."""
        if input.shape[1] % ALIGNMENT == 0 or not input.is_cuda or input.dtype == torch.float32:
            return super().forward(input)
        return F.linear(aligned(input), aligned(self.weight), self.bias)


def aligned(rows: Tensor) -> Tensor:
    """`(M, K)` with zeros behind each row up to a multiple of `ALIGNMENT`."""
    return F.pad(rows, (0, -rows.shape[1] % ALIGNMENT))

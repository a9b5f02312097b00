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
        missing = -input.shape[1] % ALIGNMENT
        if not missing or not input.is_cuda or input.dtype == torch.float32:
            return super().forward(input)
        return F.linear(F.pad(input, (0, missing)), F.pad(self.weight, (0, missing)), self.bias)

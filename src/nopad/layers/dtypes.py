"""Dtypes of intermediate results."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast half precision to float32; float32 and float64 are returned unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

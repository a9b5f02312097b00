"""Number formats of GEMMs on a GPU, and the alignment of rows that they need: 16 bytes."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_ALIGNMENT = 16
"""Float8 values in 16 bytes."""
HALF_ALIGNMENT = 8
"""Half-precision values in 16 bytes."""

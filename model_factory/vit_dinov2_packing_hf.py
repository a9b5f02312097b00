"""DINOv2 over packs, beside the modules of the specification; the work is done in `nopad.families.dinov2`.

`DINOv2Packing` takes `hidden_states (T, P)` and `grid_thw (N, 3)`; CLS and register tokens are made inside, one set per
image or frame, and are no part of the packed output.
"""

from __future__ import annotations

from nopad.families.dinov2 import DINOv2Embeddings, DINOv2Packing, dinov2_block
from nopad.families.dinov2_checkpoints import DINOv2PackingConfig, DINOv2WithRegistersPackingConfig

__all__ = [
    "DINOv2Embeddings",
    "DINOv2Packing",
    "DINOv2PackingConfig",
    "DINOv2WithRegistersPackingConfig",
    "dinov2_block",
]

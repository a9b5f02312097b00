"""DINOv3 over packs at the address of its specification; the work is done in `nopad.families.dinov3`.

`DINOv3ViTPacking` takes `hidden_states (T, P)` and `grid_thw (N, 3)`; CLS and register tokens are made inside, one set
per image or frame, and are no part of the packed output.
"""

from __future__ import annotations

from nopad.families.dinov3 import DINOv3Embeddings, DINOv3Rope, DINOv3ViTPacking, dinov3_block
from nopad.families.dinov3_checkpoints import DINOv3ViTPackingConfig

__all__ = ["DINOv3Embeddings", "DINOv3Rope", "DINOv3ViTPacking", "DINOv3ViTPackingConfig", "dinov3_block"]

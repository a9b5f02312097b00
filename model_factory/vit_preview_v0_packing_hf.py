"""Preview v0 of OneVision-Encoder over packs; the work is done in `nopad.families.onevision`.

It takes `hidden_states (T, P)` with patches laid out `(C, ph, pw)`, `grid_thw (N, 3)` and, for clips whose frames are
numbered otherwise or that keep only some patches, `patch_positions (T, 3)`.
"""

from __future__ import annotations

from nopad.families.onevision import OneVisionEncoderPacking
from nopad.families.onevision_checkpoints import OneVisionPackingConfig

__all__ = ["LlavaViTPackingConfig", "LlavaViTPackingModel", "OneVisionEncoderPacking"]

# The names of the original file.
LlavaViTPackingConfig = OneVisionPackingConfig
LlavaViTPackingModel = OneVisionEncoderPacking

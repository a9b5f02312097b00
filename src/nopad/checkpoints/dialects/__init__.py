"""How each family's checkpoints name their tensors: a checkpoint is recognised before its family is imported."""

from __future__ import annotations

from collections.abc import Mapping

from nopad.checkpoints.dialects import (
    aimv2,
    clip,
    dinov2,
    dinov3,
    moonvit,
    onevision,
    pe,
    pixtral,
    qwen2_vl,
    qwen3_vl,
    radio,
    siglip2,
    vit,
)
from nopad.checkpoints.formats import Dialect

DIALECTS: Mapping[str, tuple[Dialect, ...]] = {
    "aimv2": aimv2.DIALECTS,
    "dinov2": dinov2.DIALECTS,
    "dinov3": dinov3.DIALECTS,
    "siglip2": siglip2.DIALECTS,
    "onevision": onevision.DIALECTS,
    "clip": clip.DIALECTS,
    "qwen2_vl": qwen2_vl.DIALECTS,
    "qwen3_vl": qwen3_vl.DIALECTS,
    "moonvit": moonvit.DIALECTS,
    "pixtral": pixtral.DIALECTS,
    "radio": radio.DIALECTS,
    "pe": pe.DIALECTS,
    "vit": vit.DIALECTS,
}
"""By the names of the families, which are those of the modules in `nopad.families`."""

"""Pretrained vision encoders at native resolution, without padding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder, PackedOutput
    from nopad.families.aimv2 import AIMv2Packing
    from nopad.families.dinov3 import DINOv3ViTPacking
    from nopad.families.onevision import OneVisionEncoderPacking
    from nopad.families.siglip2 import Siglip2NaflexPacking
    from nopad.loading import load
    from nopad.packing import Pack, patchify, unpatchify

__version__ = "0.1.0"

__all__ = [
    "AIMv2Packing",
    "DINOv3ViTPacking",
    "OneVisionEncoderPacking",
    "Pack",
    "PackedEncoder",
    "PackedOutput",
    "Siglip2NaflexPacking",
    "load",
    "patchify",
    "unpatchify",
]

# Imported when first used: `import nopad` is quick and needs neither torch nor transformers.
_HOMES = {
    "AIMv2Packing": "nopad.families.aimv2",
    "DINOv3ViTPacking": "nopad.families.dinov3",
    "OneVisionEncoderPacking": "nopad.families.onevision",
    "Pack": "nopad.packing",
    "PackedEncoder": "nopad.encoder",
    "PackedOutput": "nopad.encoder",
    "Siglip2NaflexPacking": "nopad.families.siglip2",
    "load": "nopad.loading",
    "patchify": "nopad.packing",
    "unpatchify": "nopad.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nopad' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

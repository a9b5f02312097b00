"""Pretrained vision encoders at native resolution, without padding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nopad.embedding.job import embed
    from nopad.embedding.table.features import Features, read
    from nopad.encoder import PackedEncoder
    from nopad.families.aimv2 import AIMv2Packing
    from nopad.families.dinov3 import DINOv3ViTPacking
    from nopad.families.onevision import OneVisionEncoderPacking
    from nopad.families.siglip2 import Siglip2NaflexPacking
    from nopad.loading import load
    from nopad.outputs import PackedOutput
    from nopad.packing import Pack, patchify, unpatchify

__version__ = "0.2.0"

__all__ = [
    "AIMv2Packing",
    "DINOv3ViTPacking",
    "Features",
    "OneVisionEncoderPacking",
    "Pack",
    "PackedEncoder",
    "PackedOutput",
    "Siglip2NaflexPacking",
    "embed",
    "load",
    "patchify",
    "read",
    "unpatchify",
]

# Imported when first used: `import nopad` is quick and needs neither torch nor transformers.
_HOMES = {
    "AIMv2Packing": "nopad.families.aimv2",
    "DINOv3ViTPacking": "nopad.families.dinov3",
    "Features": "nopad.embedding.table.features",
    "OneVisionEncoderPacking": "nopad.families.onevision",
    "Pack": "nopad.packing",
    "PackedEncoder": "nopad.encoder",
    "PackedOutput": "nopad.outputs",
    "Siglip2NaflexPacking": "nopad.families.siglip2",
    "embed": "nopad.embedding.job",
    "load": "nopad.loading",
    "patchify": "nopad.packing",
    "read": "nopad.embedding.table.features",
    "unpatchify": "nopad.packing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nopad' has no attribute {name!r}")
    try:
        home = importlib.import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if error.name in ("filelock", "pyarrow"):
            told = f"nopad.{name} needs {error.name}: pip install 'nopad[embed]'"
            raise ImportError(told, name=error.name) from error
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

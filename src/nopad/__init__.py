"""Pretrained vision encoders at native resolution, without padding."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from nopad.lazy import lazy_names

if TYPE_CHECKING:
    from nopad import align, bench, data, maps
    from nopad.embedding.api import embed
    from nopad.encoder import PackedEncoder
    from nopad.families.aimv2 import AIMv2Packing
    from nopad.families.clip import CLIPPacking
    from nopad.families.dinov2 import DINOv2Packing
    from nopad.families.dinov3 import DINOv3ViTPacking
    from nopad.families.moonvit import MoonViTPacking
    from nopad.families.onevision import OneVisionEncoderPacking
    from nopad.families.pe import PEPacking
    from nopad.families.pixtral import PixtralPacking
    from nopad.families.qwen2_vl import Qwen2VLPacking
    from nopad.families.qwen3_vl import Qwen3VLPacking
    from nopad.families.radio import RadioPacking
    from nopad.families.siglip2 import Siglip2NaflexPacking
    from nopad.families.vit import ViTPacking
    from nopad.loading import load, processor
    from nopad.merging import merge
    from nopad.outputs import PackedOutput
    from nopad.packing import Pack
    from nopad.patches import patchify, unpatchify
    from nopad.search.batches import iterate_features
    from nopad.search.features import Features
    from nopad.search.reading import read, read_features

__version__ = "0.2.0"

__all__ = [
    "AIMv2Packing",
    "CLIPPacking",
    "DINOv2Packing",
    "DINOv3ViTPacking",
    "Features",
    "MoonViTPacking",
    "OneVisionEncoderPacking",
    "PEPacking",
    "Pack",
    "PackedEncoder",
    "PackedOutput",
    "PixtralPacking",
    "Qwen2VLPacking",
    "Qwen3VLPacking",
    "RadioPacking",
    "Siglip2NaflexPacking",
    "ViTPacking",
    "align",
    "bench",
    "data",
    "embed",
    "iterate_features",
    "load",
    "maps",
    "merge",
    "patchify",
    "processor",
    "read",
    "read_features",
    "unpatchify",
]

# Imported when first used: `import nopad` is quick and needs neither torch nor transformers.
_HOMES = {
    "AIMv2Packing": "nopad.families.aimv2",
    "CLIPPacking": "nopad.families.clip",
    "DINOv2Packing": "nopad.families.dinov2",
    "DINOv3ViTPacking": "nopad.families.dinov3",
    "Features": "nopad.search.features",
    "MoonViTPacking": "nopad.families.moonvit",
    "OneVisionEncoderPacking": "nopad.families.onevision",
    "Pack": "nopad.packing",
    "PEPacking": "nopad.families.pe",
    "PackedEncoder": "nopad.encoder",
    "PackedOutput": "nopad.outputs",
    "PixtralPacking": "nopad.families.pixtral",
    "Qwen2VLPacking": "nopad.families.qwen2_vl",
    "Qwen3VLPacking": "nopad.families.qwen3_vl",
    "RadioPacking": "nopad.families.radio",
    "Siglip2NaflexPacking": "nopad.families.siglip2",
    "ViTPacking": "nopad.families.vit",
    "align": "nopad.align",
    "bench": "nopad.bench",
    "data": "nopad.data",
    "embed": "nopad.embedding.api",
    "iterate_features": "nopad.search.batches",
    "load": "nopad.loading",
    "maps": "nopad.maps",
    "merge": "nopad.merging",
    "patchify": "nopad.patches",
    "processor": "nopad.loading",
    "read": "nopad.search.reading",
    "read_features": "nopad.search.reading",
    "unpatchify": "nopad.patches",
}

# Looked for first: without filelock huggingface_hub, too, fails with a message of its own.
_EXTRAS = {
    "Features": ("pyarrow",),
    "embed": ("filelock", "pyarrow"),
    "iterate_features": ("pyarrow",),
    "read": ("pyarrow",),
    "read_features": ("pyarrow",),
}


_import = lazy_names(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    for package in _EXTRAS.get(name, ()):
        if importlib.util.find_spec(package) is None:
            from nopad.extras import install

            raise ImportError(f"nopad.{name} needs {package}: {install('embed')}", name=package)
    return _import(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

"""The families of encoders, each one file that reads top to bottom as that model, imported when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from nopad.checkpoints.dialects import DIALECTS
from nopad.checkpoints.formats import Checkpoint, matching_dialect
from nopad.checkpoints.towers import describe
from nopad.encoder import PackedEncoder
from nopad.published import published_models
from nopad.suggestions import did_you_mean

ENCODERS: Mapping[str, str] = {
    "aimv2": "AIMv2Packing",
    "dinov2": "DINOv2Packing",
    "dinov3": "DINOv3ViTPacking",
    "siglip2": "Siglip2NaflexPacking",
    "onevision": "OneVisionEncoderPacking",
    "clip": "CLIPPacking",
    "qwen2_vl": "Qwen2VLPacking",
    "qwen3_vl": "Qwen3VLPacking",
    "moonvit": "MoonViTPacking",
    "pixtral": "PixtralPacking",
    "radio": "RadioPacking",
    "pe": "PEPacking",
    "vit": "ViTPacking",
}
"""The encoder of each family, by the family's name, which is that of its module here and of its dialects."""


def encoder_class(family: str) -> type[PackedEncoder]:
    """The encoder of a family; its module is imported, and with it transformers' classes of that model alone."""
    return getattr(importlib.import_module(f"{__name__}.{family}"), ENCODERS[family])


def family_of(checkpoint: Checkpoint) -> type[PackedEncoder]:
    """The encoder of the family that a checkpoint belongs to, by its tensor names.

    Raises:
        ValueError: no family, or several.
    """
    matches = [family for family in ENCODERS if matching_dialect(DIALECTS[family], checkpoint) is not None]
    if len(matches) != 1:
        layouts = "; ".join(f"{family} ({', '.join(d.name for d in DIALECTS[family])})" for family in ENCODERS)
        problem = f"the tensors of {' and '.join(matches)}" if matches else "tensors of an unknown family"
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {problem}, such as {sorted(checkpoint.tensors)[:10]}; known are {layouts}"
            + describe(checkpoint)
        )
    return encoder_class(matches[0])


def family_of_published(name: str) -> type[PackedEncoder]:
    """The encoder of the family that published a model under this name.

    Raises:
        ValueError: none did.
    """
    families = {model["name"]: model["family"] for model in published_models()}
    if name not in families:
        hint = did_you_mean(name, families) or "; `nopad models` lists them"
        raise ValueError(f"checkpoint 'untrained:{name}': expected the name of a published model{hint}")
    return encoder_class(families[name])

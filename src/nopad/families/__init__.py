"""The families of encoders, each one file that reads top to bottom as that model."""

from __future__ import annotations

from nopad.checkpoints.formats import Checkpoint
from nopad.checkpoints.towers import describe
from nopad.encoder import PackedEncoder
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.clip import CLIPPacking
from nopad.families.dinov2 import DINOv2Packing
from nopad.families.dinov3 import DINOv3ViTPacking
from nopad.families.onevision import OneVisionEncoderPacking
from nopad.families.qwen3_vl import Qwen3VLPacking
from nopad.families.siglip2 import Siglip2NaflexPacking
from nopad.suggestions import did_you_mean

FAMILIES: tuple[type[PackedEncoder], ...] = (
    AIMv2Packing,
    DINOv2Packing,
    DINOv3ViTPacking,
    Siglip2NaflexPacking,
    OneVisionEncoderPacking,
    CLIPPacking,
    Qwen3VLPacking,
)


def family_of(checkpoint: Checkpoint) -> type[PackedEncoder]:
    """The family that a checkpoint belongs to, by its tensor names.

    Raises:
        ValueError: none does, or several do.
    """
    matches = [family for family in FAMILIES if family.dialect_of(checkpoint) is not None]
    if len(matches) != 1:
        known = "; ".join(f"{f.family} ({', '.join(d.name for d in f.dialects)})" for f in FAMILIES)
        problem = (
            f"the tensors of {' and '.join(f.family for f in matches)}" if matches else "tensors of an unknown family"
        )
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {problem}, such as {sorted(checkpoint.tensors)[:10]}; known are {known}"
            + describe(checkpoint)
        )
    return matches[0]


def family_of_published(name: str) -> type[PackedEncoder]:
    """The family that published a model under this name.

    Raises:
        ValueError: none did.
    """
    for family in FAMILIES:
        if name in family.published:
            return family
    known = [published for family in FAMILIES for published in family.published]
    hint = did_you_mean(name, known) or "; `nopad models` lists them"
    raise ValueError(f"checkpoint 'untrained:{name}': expected the name of a published model{hint}")

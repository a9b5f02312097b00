"""The reference model of each family, run one image at a time and unpadded; imported when it is needed."""

from __future__ import annotations

import importlib

from nopad.align.reference_model import ReferenceModel
from nopad.encoder import PackedEncoder


def reference_of(encoder: PackedEncoder) -> ReferenceModel:
    """The reference of an encoder's family: `REFERENCE` of the module with the family's name."""
    return importlib.import_module(f"{__name__}.{encoder.family}").REFERENCE

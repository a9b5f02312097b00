"""Perception Encoder has no reference: its model is not part of transformers."""

from __future__ import annotations

from nopad.align.reference_model import NoReference

REFERENCE = NoReference("its model is not part of transformers, and its files bring no code")

"""Qwen3-VL's and Qwen3.5's dialect: how transformers names their tensors."""

from __future__ import annotations

from nopad.checkpoints.formats import Dialect

DIALECTS = (Dialect("transformers", r"^blocks\.\d+\.mlp\.linear_fc[12]\.", is_original=True),)

"""Qwen2-VL's and Qwen2.5-VL's dialect: transformers' names, whichever feed-forward layers there are."""

from __future__ import annotations

from nopad.checkpoints.formats import Dialect

DIALECTS = (
    Dialect(
        "transformers",
        r"^merger\.mlp\.[02]\.",
        requires=(r"^blocks\.\d+\.mlp\.(fc[12]|(gate|up|down)_proj)\.",),
        is_original=True,
    ),
)

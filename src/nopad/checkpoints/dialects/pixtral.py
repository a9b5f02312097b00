"""Pixtral's dialects: how transformers and Mistral name its tensors."""

from __future__ import annotations

from nopad.checkpoints.conversions import NameTable, Rename, halves_of_pairs
from nopad.checkpoints.formats import Dialect

MISTRAL_HEADS = 16
"""Heads of all models that Mistral has published. Its files have the two channels of a rotated pair as neighbours,
transformers' half a head apart, so that the rows of queries and keys have another order in each head."""

_LAYER = "transformer.layers.*"
_ROWS = halves_of_pairs(MISTRAL_HEADS)
_MISTRAL = NameTable(
    Rename(f"{_LAYER}.attention.wq.weight", f"{_LAYER}.attention.q_proj.weight", reshape=_ROWS),
    Rename(f"{_LAYER}.attention.wk.weight", f"{_LAYER}.attention.k_proj.weight", reshape=_ROWS),
    Rename(f"{_LAYER}.attention.wv.weight", f"{_LAYER}.attention.v_proj.weight"),
    Rename(f"{_LAYER}.attention.wo.weight", f"{_LAYER}.attention.o_proj.weight"),
    Rename(f"{_LAYER}.feed_forward.w1.weight", f"{_LAYER}.feed_forward.gate_proj.weight"),
    Rename(f"{_LAYER}.feed_forward.w3.weight", f"{_LAYER}.feed_forward.up_proj.weight"),
    Rename(f"{_LAYER}.feed_forward.w2.weight", f"{_LAYER}.feed_forward.down_proj.weight"),
)

DIALECTS = (
    Dialect("transformers", r"^transformer\.layers\.\d+\.feed_forward\.(gate|up|down)_proj\.", is_original=True),
    Dialect("Mistral", r"^transformer\.layers\.\d+\.feed_forward\.w[123]\.", _MISTRAL),
)

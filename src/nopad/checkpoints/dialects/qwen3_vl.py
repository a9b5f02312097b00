"""Qwen3-VL's and Qwen3.5's dialects: how transformers and timm name their tensors."""

from __future__ import annotations

from nopad.checkpoints.conversions import ADD_FRAMES, DROP_AXIS, NameTable, Rename
from nopad.checkpoints.formats import Dialect

# timm's encoder takes images alone, and adds up the kernel's frames: the two of an image are the same.
TIMM = NameTable(
    Rename("patch_embed.proj.weight", "patch_embed.proj.weight", reshape=ADD_FRAMES),
    Rename("pos_embed", "pos_embed.weight", reshape=DROP_AXIS),
    *(
        Rename(f"{file}.fc{number}.*", f"{file}.linear_fc{number}.*")
        for file in ("blocks.*.mlp", "merger")
        for number in (1, 2)
    ),
)

DIALECTS = (
    Dialect("transformers", r"^blocks\.\d+\.mlp\.linear_fc[12]\.", is_original=True),
    Dialect(
        "timm",
        r"^merger\.fc[12]\.",
        TIMM,
        requires=(r"^blocks\.\d+\.mlp\.fc[12]\.",),
        prefixes=("encoder.",),  # of its classifiers
        dropped=(r"^head\.(weight|bias)$",),
    ),
)

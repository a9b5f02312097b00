"""OneVision-Encoder's dialects: how the Hub and the preview v0 name its tensors."""

from __future__ import annotations

from nopad.checkpoints.conversions import NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Dialect

_ATTENTION = "encoder.layers.*.self_attn"
_PREVIEW_V0 = NameTable(
    Rename("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    split_qkv(f"{_ATTENTION}.qkv.*", _ATTENTION),
    Rename(f"{_ATTENTION}.proj.*", f"{_ATTENTION}.out_proj.*"),
)

# The name under which training code keeps a compiled encoder.
_PREFIXES = ("encoder._orig_mod.",)

# SigLIP names its layers as the Hub's, but not its norms.
DIALECTS = (
    Dialect(
        "Hub",
        r"^encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj\.",
        prefixes=_PREFIXES,
        requires=(r"^layernorm_(pre|post)\.",),
        is_original=True,
    ),
    Dialect(
        "preview v0",
        r"^encoder\.layers\.\d+\.self_attn\.(qkv|proj)\.",
        _PREVIEW_V0,
        prefixes=_PREFIXES,
        requires=(r"^layernorm_(pre|post)\.",),
    ),
)

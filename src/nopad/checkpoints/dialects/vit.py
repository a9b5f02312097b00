"""The dialects of plain vision transformers: how transformers, Meta (Pixio) and timm name their tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nopad.checkpoints.conversions import NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Dialect
from nopad.checkpoints.timm_config import CLASSIFIER

_LAYER, _ATTENTION = "layers.*", "layers.*.attention"

# transformers has names of its own in memory; its files have kept these.
_PUBLISHED_LINES = (
    Rename("encoder.layer.*.attention.attention.query.**", f"{_ATTENTION}.q_proj.**"),
    Rename("encoder.layer.*.attention.attention.key.**", f"{_ATTENTION}.k_proj.**"),
    Rename("encoder.layer.*.attention.attention.value.**", f"{_ATTENTION}.v_proj.**"),
    Rename("encoder.layer.*.attention.output.dense.**", f"{_ATTENTION}.o_proj.**"),
)
_DENSE_LINES = (
    Rename("encoder.layer.*.intermediate.dense.**", f"{_LAYER}.mlp.fc1.**"),
    Rename("encoder.layer.*.output.dense.**", f"{_LAYER}.mlp.fc2.**"),
)
_PUBLISHED_NAMES = NameTable(
    *_PUBLISHED_LINES,
    *_DENSE_LINES,
    Rename("encoder.layer.*.layernorm_before.*", f"{_LAYER}.layernorm_before.*"),
    Rename("encoder.layer.*.layernorm_after.*", f"{_LAYER}.layernorm_after.*"),
)
_PIXIO_LINES = (
    *_PUBLISHED_LINES,
    Rename("encoder.layer.*.norm1.*", f"{_LAYER}.layernorm_before.*"),
    Rename("encoder.layer.*.norm2.*", f"{_LAYER}.layernorm_after.*"),
)
_PIXIO_HUB = NameTable(
    *_PIXIO_LINES,
    Rename("encoder.layer.*.mlp.fc1.*", f"{_LAYER}.mlp.fc1.*"),
    Rename("encoder.layer.*.mlp.fc2.*", f"{_LAYER}.mlp.fc2.*"),
)
_PIXIO = NameTable(*_PIXIO_LINES, *_DENSE_LINES)  # as transformers saves it
TIMM = NameTable(
    Rename("cls_token", "embeddings.cls_token"),
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.layernorm_before.*"),
    split_qkv("blocks.*.attn.qkv.*", _ATTENTION),
    Rename("blocks.*.attn.proj.*", f"{_ATTENTION}.o_proj.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.layernorm_after.*"),
    Rename("blocks.*.mlp.**", f"{_LAYER}.mlp.**"),
    Rename("norm.*", "layernorm.*"),
)

_TRANSFORMERS: dict[str, Any] = {
    "prefixes": ("vit.", "ijepa.", "pixio."),
    # The classifier, and what restores masked patches.
    "dropped": (r"^(classifier|decoder)\.", r"^(vit\.)?embeddings\.mask_token$"),
    "is_original": True,
}
_OF_PIXIO = {**_TRANSFORMERS, "is_original": False}
_NORM1, _DENSE = r"^encoder\.layer\.\d+\.norm1\.", r"^encoder\.layer\.\d+\.intermediate\.dense\."
_OF_OTHERS = (r"\.layer_scale[12]\.", r"^encoder\.layer\.\d+\.attention\.[qkv]_proj\.")
"""DINOv2's, and C-RADIO's in memory."""

DIALECTS = (
    Dialect("transformers", r"^encoder\.layer\.\d+\.layernorm_before\.", _PUBLISHED_NAMES, **_TRANSFORMERS),
    Dialect("transformers, in memory", r"^layers\.\d+\.layernorm_before\.", **_TRANSFORMERS),
    Dialect("transformers, Pixio", _NORM1, _PIXIO, requires=(_DENSE,), excludes=_OF_OTHERS, **_OF_PIXIO),
    Dialect("transformers, Pixio on the Hub", _NORM1, _PIXIO_HUB, excludes=(_DENSE, *_OF_OTHERS), **_OF_PIXIO),
    Dialect(
        "timm",
        r"^blocks\.\d+\.mlp\.fc1\.bias$",
        TIMM,
        requires=(r"^cls_token$", r"^pos_embed$", r"^blocks\.\d+\.attn\.qkv\.bias$"),
        # Of other vision transformers.
        excludes=(r"^(reg|dist|mask)_token$", r"\.gamma_[12]$", r"\.ls[12]\.", r"^norm_pre\.", r"\.(q|k)_norm\."),
        dropped=CLASSIFIER,
    ),
)
_READ_AS_PIXIO = ("transformers, Pixio", "transformers, Pixio on the Hub", "transformers, in memory")
PIXIO_DIALECTS = tuple(
    replace(dialect, is_original=dialect.name in _READ_AS_PIXIO)
    for dialect in sorted(DIALECTS, key=lambda dialect: dialect.name != "transformers, Pixio")
)
"""The same for Pixio, whose files by transformers have names of their own, and Meta's `.pth` those of timm."""

"""The dialects of plain vision transformers: how transformers and timm name their tensors."""

from __future__ import annotations

from typing import Any

from nopad.checkpoints.conversions import NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Dialect
from nopad.checkpoints.timm_config import CLASSIFIER

_LAYER, _ATTENTION = "layers.*", "layers.*.attention"

# transformers has names of its own in memory; its files have kept these.
_PUBLISHED_NAMES = NameTable(
    Rename("encoder.layer.*.attention.attention.query.**", f"{_ATTENTION}.q_proj.**"),
    Rename("encoder.layer.*.attention.attention.key.**", f"{_ATTENTION}.k_proj.**"),
    Rename("encoder.layer.*.attention.attention.value.**", f"{_ATTENTION}.v_proj.**"),
    Rename("encoder.layer.*.attention.output.dense.**", f"{_ATTENTION}.o_proj.**"),
    Rename("encoder.layer.*.intermediate.dense.**", f"{_LAYER}.mlp.fc1.**"),
    Rename("encoder.layer.*.output.dense.**", f"{_LAYER}.mlp.fc2.**"),
    Rename("encoder.layer.*.layernorm_before.*", f"{_LAYER}.layernorm_before.*"),
    Rename("encoder.layer.*.layernorm_after.*", f"{_LAYER}.layernorm_after.*"),
)
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
    "prefixes": ("vit.", "ijepa."),
    # The classifier, and what restores masked patches.
    "dropped": (r"^(classifier|decoder)\.", r"^(vit\.)?embeddings\.mask_token$"),
    "is_original": True,
}

DIALECTS = (
    Dialect("transformers", r"^encoder\.layer\.\d+\.layernorm_before\.", _PUBLISHED_NAMES, **_TRANSFORMERS),
    Dialect("transformers, in memory", r"^layers\.\d+\.layernorm_before\.", **_TRANSFORMERS),
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

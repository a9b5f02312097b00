"""DINOv2's dialects, and TIPSv2's: how transformers, Meta and timm name their tensors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from nopad.checkpoints.conversions import WITHOUT_FIRST, NameTable, Rename, split_qkv, split_rows
from nopad.checkpoints.dialects.radio import EMBEDDINGS as RADIO_EMBEDDINGS
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.checkpoints.timm_config import CLASSIFIER

_LAYER, _ATTENTION = "encoder.layer.*", "encoder.layer.*.attention"
_GATE_UP = [f"{_LAYER}.mlp.{part}_proj.*" for part in ("gate", "up")]

# transformers has had names of its own in memory since 5.18; its files have kept these.
_PUBLISHED_NAMES = NameTable(
    Rename(f"{_ATTENTION}.attention.query.**", f"{_ATTENTION}.q_proj.**"),
    Rename(f"{_ATTENTION}.attention.key.**", f"{_ATTENTION}.k_proj.**"),
    Rename(f"{_ATTENTION}.attention.value.**", f"{_ATTENTION}.v_proj.**"),
    Rename(f"{_ATTENTION}.output.dense.**", f"{_ATTENTION}.o_proj.**"),
    Rename(f"{_LAYER}.mlp.weights_in.*", *_GATE_UP, reshape=split_rows(2)),
    Rename(f"{_LAYER}.mlp.weights_out.**", f"{_LAYER}.mlp.down_proj.**"),
)
_MLP_LINES = tuple(Rename(f"blocks.*.mlp.{name}.*", f"{_LAYER}.mlp.{name}.*") for name in ("fc1", "fc2"))
_BLOCK_LINES = (
    Rename("cls_token", "embeddings.cls_token"),
    Rename("mask_token", "embeddings.mask_token"),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.norm1.*"),
    split_qkv("blocks.*.attn.qkv.*", _ATTENTION),
    Rename("blocks.*.attn.proj.*", f"{_ATTENTION}.o_proj.*"),
    Rename("blocks.*.ls1.gamma", f"{_LAYER}.layer_scale1.lambda1"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.norm2.*"),
    Rename("blocks.*.ls2.gamma", f"{_LAYER}.layer_scale2.lambda1"),
    Rename("norm.*", "layernorm.*"),
)
_POSITIONS_LINE = Rename("pos_embed", "embeddings.position_embeddings")
_META_LINES = (
    Rename("register_tokens", "embeddings.register_tokens"),
    _POSITIONS_LINE,
    Rename("blocks.*.mlp.w12.*", *_GATE_UP, reshape=split_rows(2)),
    Rename("blocks.*.mlp.w3.*", f"{_LAYER}.mlp.down_proj.*"),
    *_BLOCK_LINES,
)
_META = NameTable(*_META_LINES, *_MLP_LINES)
_TIPSV2 = NameTable(  # that of transformers' class, which reads Meta's names too
    Rename("blocks.*.mlp.c_fc.*", f"{_LAYER}.mlp.fc1.*"),
    Rename("blocks.*.mlp.c_proj.*", f"{_LAYER}.mlp.fc2.*"),
    *_META_LINES,
)
_GATED = " (gated)"
"""Suffix for the names of timm's packed SwiGLU, which are those of a plain layer."""
_TIMM_LINES = (
    *(
        line
        for kind in ("weight", "bias")
        for line in (
            Rename(
                f"blocks.*.mlp.fc1.{kind}{_GATED}",
                *(f"{_LAYER}.mlp.{part}_proj.{kind}" for part in ("gate", "up")),
                reshape=split_rows(2),
            ),
            Rename(f"blocks.*.mlp.fc2.{kind}{_GATED}", f"{_LAYER}.mlp.down_proj.{kind}"),
        )
    ),
    *_BLOCK_LINES,
    *_MLP_LINES,
)
TIMM = NameTable(_POSITIONS_LINE, *_TIMM_LINES)
TIMM_REGISTERS = NameTable(
    Rename("reg_token", "embeddings.register_tokens"),
    # CLS has its position added to it.
    Rename("pos_embed", "embeddings.position_embeddings", reshape=WITHOUT_FIRST),
    *_TIMM_LINES,
)


def _prepare_timm(checkpoint: Checkpoint) -> Checkpoint:
    """Rename packed SwiGLU, and add a mask token.

    timm leaves that out. It is for masked training alone, and zeros in a fresh model.
    """
    tensors = dict(checkpoint.tensors)
    up, down, cls = (tensors.get(name) for name in (f"{_TIMM_MLP}.fc1.weight", f"{_TIMM_MLP}.fc2.weight", "cls_token"))
    if up and down and up.shape and len(down.shape) == 2 and up.shape[0] == 2 * down.shape[1]:
        tensors = {
            name + _GATED * bool(re.search(r"\.mlp\.fc[12]\.", name)): tensor for name, tensor in tensors.items()
        }
    if cls and cls.shape:
        size = cls.shape[-1]
        tensors["mask_token"] = StoredTensor((1, size), cls.dtype, lambda: torch.zeros(1, size, dtype=cls.dtype))
    return replace(checkpoint, tensors=tensors)


_TIMM_MLP = "blocks.0.mlp"
_TRANSFORMERS: dict[str, Any] = {
    "requires": (r"^encoder\.layer\.\d+\.layer_scale1\.lambda1$",),
    "prefixes": ("dinov2.", "dinov2_with_registers."),
    "dropped": (r"^classifier\.",),
    "is_original": True,
}

_NOT_TIMMS = (
    r"^(mask_token|register_tokens)$",
    r"^norm_pre\.",
    r"\.(q|k)_norm\.",
)
"""Meta's, and other vision transformers'."""
_TIMMS: dict[str, Any] = {
    "requires": (r"^pos_embed$", r"^cls_token$", r"^blocks\.\d+\.ls1\.gamma$"),
    "dropped": CLASSIFIER,
    "prepare": _prepare_timm,
}
_C_FC = r"^blocks\.\d+\.mlp\.c_fc\."
DIALECTS = (
    Dialect("transformers", r"^encoder\.layer\.\d+\.attention\.attention\.query\.", _PUBLISHED_NAMES, **_TRANSFORMERS),
    Dialect(
        "transformers, in memory",
        r"^encoder\.layer\.\d+\.attention\.q_proj\.",
        excludes=(RADIO_EMBEDDINGS,),
        **_TRANSFORMERS,
    ),
    Dialect(
        "Meta",
        r"^blocks\.\d+\.ls1\.gamma$",
        _META,
        requires=(r"^(mask_token|register_tokens)$",),  # which timm's files do not have
        excludes=(_C_FC, r"^(storage_tokens|rope_embed\.periods)$"),  # DINOv3's
    ),
    Dialect("transformers, TIPSv2", _C_FC, _TIPSV2, requires=(r"^blocks\.\d+\.ls1\.gamma$",)),
    Dialect("timm", r"^blocks\.\d+\.ls1\.gamma$", TIMM, excludes=(r"^reg_token$", *_NOT_TIMMS), **_TIMMS),
    Dialect("timm, registers", r"^reg_token$", TIMM_REGISTERS, excludes=_NOT_TIMMS, **_TIMMS),
)
_META_FIRST = sorted(DIALECTS, key=lambda dialect: dialect.name != "Meta")
TIPSV2_DIALECTS = tuple(
    replace(dialect, is_original=dialect.name in ("Meta", "transformers, in memory")) for dialect in _META_FIRST
)
"""The same for TIPSv2, whose published files have Meta's names, which are saved and which transformers' class reads."""

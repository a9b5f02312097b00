"""DINOv3's dialects: how transformers, Meta and timm name its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nopad.checkpoints.conversions import ADD_AXIS, NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.checkpoints.timm_config import CLASSIFIER

_LAYER = "model.layer.*"
_META_TABLE = (
    Rename("cls_token", "embeddings.cls_token"),
    Rename("storage_tokens", "embeddings.register_tokens"),
    Rename("mask_token", "embeddings.mask_token", reshape=ADD_AXIS),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.norm1.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.norm2.*"),
    split_qkv("blocks.*.attn.qkv.weight", f"{_LAYER}.attention", "weight"),
    # The bias of keys is masked with zeros where the model has none.
    split_qkv("blocks.*.attn.qkv.bias", f"{_LAYER}.attention", "bias", optional=True),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.attention.o_proj.*"),
    Rename("blocks.*.ls1.gamma", f"{_LAYER}.layer_scale1.lambda1"),
    Rename("blocks.*.ls2.gamma", f"{_LAYER}.layer_scale2.lambda1"),
)
META_PLAIN = NameTable(
    *_META_TABLE,
    Rename("blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.up_proj.*"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.down_proj.*"),
)
META_GATED = NameTable(
    *_META_TABLE,
    Rename("blocks.*.mlp.w1.*", f"{_LAYER}.mlp.gate_proj.*"),
    Rename("blocks.*.mlp.w2.*", f"{_LAYER}.mlp.up_proj.*"),
    Rename("blocks.*.mlp.w3.*", f"{_LAYER}.mlp.down_proj.*"),
)

_TIMM_TABLE = (
    Rename("cls_token", "embeddings.cls_token"),
    Rename("reg_token", "embeddings.register_tokens"),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.norm1.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.norm2.*"),
    split_qkv("blocks.*.attn.qkv.weight", f"{_LAYER}.attention", "weight"),
    *(Rename(f"blocks.*.attn.{part}_bias", f"{_LAYER}.attention.{part}_proj.bias") for part in "qv"),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.attention.o_proj.*"),
    Rename("blocks.*.gamma_1", f"{_LAYER}.layer_scale1.lambda1"),
    Rename("blocks.*.gamma_2", f"{_LAYER}.layer_scale2.lambda1"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.down_proj.*"),
)
TIMM_PLAIN = NameTable(*_TIMM_TABLE, Rename("blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.up_proj.*"))
TIMM_GATED = NameTable(
    *_TIMM_TABLE,
    Rename("blocks.*.mlp.fc1_g.*", f"{_LAYER}.mlp.gate_proj.*"),
    Rename("blocks.*.mlp.fc1_x.*", f"{_LAYER}.mlp.up_proj.*"),
)

_BIAS_MASK, PERIODS = r"^blocks\.\d+\.attn\.qkv\.bias_mask$", "rope_embed.periods"


def _mask_biases(checkpoint: Checkpoint) -> Checkpoint:
    """Multiply the biases of queries, keys and values by Meta's masks of zeros and ones, as Meta's model does."""

    def masked(bias: StoredTensor, mask: StoredTensor) -> StoredTensor:
        return replace(bias, read=lambda: bias.read() * mask.read().to(bias.dtype))

    biases = {name: f"{name}_mask" for name in checkpoint.tensors if f"{name}_mask" in checkpoint.left_out}
    products = {name: masked(checkpoint.tensors[name], checkpoint.left_out[mask]) for name, mask in biases.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **products})


def _add_tokens(checkpoint: Checkpoint) -> Checkpoint:
    """Add the mask token, which only masked training reads, and registers of no rows, where timm has none."""
    cls_token = checkpoint.tensors.get("cls_token")
    if cls_token is None:
        return checkpoint

    def zeros(num_rows: int) -> StoredTensor:
        shape = (1, num_rows, cls_token.shape[-1] if cls_token.shape else 0)
        return StoredTensor(shape, cls_token.dtype, lambda: torch.zeros(shape, dtype=cls_token.dtype))

    added = {"embeddings.mask_token": zeros(1), "reg_token": zeros(0)}
    return replace(checkpoint, tensors={**added, **checkpoint.tensors})


_META: dict[str, Any] = {
    "signature": r"^(storage_tokens|rope_embed\.periods)$",
    "prepare": _mask_biases,
    # `local_cls_norm` is for the small crops of training alone; the others are read by `read_config`.
    "dropped": (_BIAS_MASK, r"^rope_embed\.periods$", r"^local_cls_norm\."),
}

# EVA, by which timm builds DINOv3, adds learned positions in its other models.
_TIMM: dict[str, Any] = {
    "signature": r"^blocks\.\d+\.gamma_1$",
    "prepare": _add_tokens,
    "requires": (r"^cls_token$",),
    "dropped": CLASSIFIER,
}

DIALECTS = (
    # In memory, and in some files, the layers are `model.layer.i`.
    Dialect(
        "transformers",
        r"^layer\.\d+\.layer_scale1\.lambda1$",
        NameTable(Rename("layer.**", "model.layer.**")),
        prefixes=("model.",),
        is_original=True,
    ),
    Dialect("Meta", table=META_PLAIN, excludes=(r"^blocks\.\d+\.mlp\.w1\.",), **_META),
    Dialect("Meta, gated", table=META_GATED, excludes=(r"^blocks\.\d+\.mlp\.fc1\.",), **_META),
    Dialect("timm", table=TIMM_PLAIN, excludes=(r"^blocks\.\d+\.mlp\.fc1_[gx]\.", r"^pos_embed$"), **_TIMM),
    Dialect("timm, gated", table=TIMM_GATED, excludes=(r"^blocks\.\d+\.mlp\.fc1\.", r"^pos_embed$"), **_TIMM),
)

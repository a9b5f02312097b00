"""Perception Encoder's dialects: how Meta, timm and OpenCLIP name its tensors."""

from __future__ import annotations

from dataclasses import replace

from nopad.checkpoints.conversions import DROP_AXES, DROP_AXIS, TRANSPOSED, Join, NameTable, Rename, split_qkv
from nopad.checkpoints.dialects.clip import OPEN_CLIP_TEXT, check_no_bias, prepare_timm_head
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.open_clip_config import timm_tower

_KINDS = ("weight", "bias")
_LAYER = "transformer.resblocks.*"


def _meta(prefix: str) -> NameTable:
    """Meta's names below a prefix; a table that leads from all names of the encoder, which are otherwise the same."""
    block = f"{prefix}{_LAYER}"
    lines = [
        Rename(f"{prefix}class_embedding", "embeddings.class_embedding"),
        Rename(f"{prefix}positional_embedding", "embeddings.position_embedding.weight"),
        Rename(f"{prefix}conv1.weight", "embeddings.patch_embedding.weight"),
        *(split_qkv(f"{block}.attn.in_proj_{kind}", f"{_LAYER}.attn", kind) for kind in _KINDS),
        *(Rename(f"{block}.ls_{i}.gamma", f"{_LAYER}.ls_{i}.lambda1") for i in (1, 2)),
        Rename(f"{prefix}proj", "projection.weight", reshape=TRANSPOSED),
    ]
    if prefix:
        lines += [
            *(Rename(f"{block}.ln_{i}.*", f"{_LAYER}.ln_{i}.*") for i in (1, 2)),
            Rename(f"{block}.attn.out_proj.**", f"{_LAYER}.attn.out_proj.**"),
            Rename(f"{block}.mlp.**", f"{_LAYER}.mlp.**"),
            *(Rename(f"{prefix}{name}.**", f"{name}.**") for name in ("ln_pre", "ln_post", "attn_pool")),
        ]
    return NameTable(*lines)


META, META_CORE = _meta(""), _meta("visual.")


def _timm(prefix: str) -> NameTable:
    """timm's names below a prefix."""
    return NameTable(
        Rename(f"{prefix}cls_token", "embeddings.class_embedding", reshape=DROP_AXES),
        Rename(f"{prefix}pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
        Rename(f"{prefix}patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
        Rename(f"{prefix}norm_pre.*", "ln_pre.*"),
        split_qkv(f"{prefix}blocks.*.attn.qkv.*", f"{_LAYER}.attn"),
        Rename(f"{prefix}blocks.*.attn.proj.*", f"{_LAYER}.attn.out_proj.*"),
        *(Rename(f"{prefix}blocks.*.norm{i}.*", f"{_LAYER}.ln_{i}.*") for i in (1, 2)),
        *(Rename(f"{prefix}blocks.*.gamma_{i}", f"{_LAYER}.ls_{i}.lambda1") for i in (1, 2)),
        Rename(f"{prefix}blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.c_fc.*"),
        Rename(f"{prefix}blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.c_proj.*"),
        Rename(f"{prefix}norm.*", "ln_post.*"),
        Rename(f"{prefix}attn_pool.latent", "attn_pool.probe"),
        *(
            Join(
                (f"{prefix}attn_pool.q.{kind}", f"{prefix}attn_pool.kv.{kind}"),
                f"attn_pool.attn.in_proj_{kind}",
                (1, 2),
            )
            for kind in _KINDS
        ),
        Rename(f"{prefix}attn_pool.proj.*", "attn_pool.attn.out_proj.*"),
        Rename(f"{prefix}attn_pool.norm.*", "attn_pool.layernorm.*"),
        Rename(f"{prefix}attn_pool.mlp.fc1.*", "attn_pool.mlp.c_fc.*"),
        Rename(f"{prefix}attn_pool.mlp.fc2.*", "attn_pool.mlp.c_proj.*"),
        Rename(f"{prefix}head.weight", "projection.weight"),
    )


TIMM, OPEN_CLIP = _timm(""), _timm("visual.trunk.")

_TEXT = (
    r"^(token_embedding|transformer|ln_final)\.",
    r"^(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
)


def _prepare_open_clip(checkpoint: Checkpoint) -> Checkpoint:
    """With the config of timm's model in OpenCLIP's, or nopad's own, and without the projection's bias of zeros."""
    tensors = dict(checkpoint.tensors)
    bias = tensors.pop("visual.trunk.head.bias", None)
    if bias is not None:
        check_no_bias(checkpoint, "visual.trunk.head.bias", bias)
    is_own = checkpoint.vision_config.get("model_type") == "perception_encoder"
    return replace(checkpoint, tensors=tensors, config=checkpoint.config if is_own else timm_tower(checkpoint))


_QKV, _NORM_PRE = r"^blocks\.\d+\.attn\.qkv\.bias$", r"^norm_pre\."
_OTHERS = (r"\.ls[12]\.", r"\.(q|k)_norm\.", r"^(reg|dist|mask)_token$")
"""Of other vision transformers of timm."""
DIALECTS = (
    Dialect(
        "Meta",
        r"^transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias)$",
        META,
        excludes=(r"^visual\.", r"^(token_embedding|ln_final)\."),  # of models with a text tower
        is_original=True,
    ),
    Dialect("Meta, in memory", r"^transformer\.resblocks\.\d+\.attn\.q_proj\.", is_original=True),
    Dialect(
        "Meta, both towers",
        r"^visual\.attn_pool\.(attn|layernorm|mlp)\.",
        META_CORE,
        dropped=_TEXT,
        text_table=OPEN_CLIP_TEXT,
    ),
    Dialect(
        "OpenCLIP",
        r"^visual\.trunk\.attn_pool\.",
        OPEN_CLIP,
        requires=(r"^visual\.trunk\.norm_pre\.",),
        dropped=(r"^text\.", r"^(logit_scale|logit_bias)$"),
        prepare=_prepare_open_clip,
        text_table=OPEN_CLIP_TEXT,
        text_prefixes=("text.",),
    ),
    Dialect(
        "timm",
        r"^attn_pool\.|\.gamma_[12]$",
        TIMM,
        requires=(_NORM_PRE, _QKV),
        excludes=_OTHERS,
        dropped=(r"^fc_norm\.",),
        prepare=prepare_timm_head,
    ),
    Dialect(
        "timm, plain",  # the models that end with their last layer, and have no layer scale
        _NORM_PRE,
        TIMM,
        requires=(_QKV,),
        excludes=(*_OTHERS, r"^attn_pool\.", r"\.gamma_[12]$", r"^(norm|fc_norm)\."),
        prepare=prepare_timm_head,
    ),
)

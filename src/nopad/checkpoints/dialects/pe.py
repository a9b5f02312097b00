"""Perception Encoder's dialects: how Meta and timm name its tensors."""

from __future__ import annotations

from nopad.checkpoints.conversions import DROP_AXES, DROP_AXIS, TRANSPOSED, Join, NameTable, Rename, split_qkv
from nopad.checkpoints.dialects.clip import prepare_timm_head
from nopad.checkpoints.formats import Dialect

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
TIMM = NameTable(
    Rename("cls_token", "embeddings.class_embedding", reshape=DROP_AXES),
    Rename("pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
    Rename("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    Rename("norm_pre.*", "ln_pre.*"),
    split_qkv("blocks.*.attn.qkv.*", f"{_LAYER}.attn"),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.attn.out_proj.*"),
    *(Rename(f"blocks.*.norm{i}.*", f"{_LAYER}.ln_{i}.*") for i in (1, 2)),
    *(Rename(f"blocks.*.gamma_{i}", f"{_LAYER}.ls_{i}.lambda1") for i in (1, 2)),
    Rename("blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.c_fc.*"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.c_proj.*"),
    Rename("norm.*", "ln_post.*"),
    Rename("attn_pool.latent", "attn_pool.probe"),
    *(
        Join((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), f"attn_pool.attn.in_proj_{kind}", (1, 2))
        for kind in _KINDS
    ),
    Rename("attn_pool.proj.*", "attn_pool.attn.out_proj.*"),
    Rename("attn_pool.norm.*", "attn_pool.layernorm.*"),
    Rename("attn_pool.mlp.fc1.*", "attn_pool.mlp.c_fc.*"),
    Rename("attn_pool.mlp.fc2.*", "attn_pool.mlp.c_proj.*"),
    Rename("head.weight", "projection.weight"),
)

_TEXT = (
    r"^(token_embedding|transformer|ln_final)\.",
    r"^(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
)
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

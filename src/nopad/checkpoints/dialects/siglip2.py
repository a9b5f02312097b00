"""SigLIP2's and SigLIP's dialects: how transformers and timm name their tensors."""

from __future__ import annotations

from nopad.checkpoints.conversions import DROP_AXIS, SQUARE_GRID, Join, NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Dialect
from nopad.checkpoints.timm_config import CLASSIFIER

_KINDS = ("weight", "bias")
_LAYER, _POOL = "encoder.layers.*", "head.attention"
_TIMM_TABLE = (
    Rename("blocks.*.norm1.*", f"{_LAYER}.layer_norm1.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.layer_norm2.*"),
    split_qkv("blocks.*.attn.qkv.*", f"{_LAYER}.self_attn"),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.self_attn.out_proj.*"),
    Rename("blocks.*.mlp.**", f"{_LAYER}.mlp.**"),
    Rename("norm.*", "post_layernorm.*"),
    Rename("attn_pool.latent", "head.probe"),
    *(Join((f"attn_pool.q.{kind}", f"attn_pool.kv.{kind}"), f"{_POOL}.in_proj_{kind}", (1, 2)) for kind in _KINDS),
    Rename("attn_pool.proj.*", f"{_POOL}.out_proj.*"),
    Rename("attn_pool.norm.*", "head.layernorm.*"),
    Rename("attn_pool.mlp.**", "head.mlp.**"),
)
TIMM = NameTable(
    Rename("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    Rename("pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
    *_TIMM_TABLE,
)
TIMM_NAFLEX = NameTable(
    Rename("embeds.proj.*", "embeddings.patch_embedding.*"),
    Rename("embeds.pos_embed", "embeddings.position_embedding.weight", reshape=SQUARE_GRID),
    *_TIMM_TABLE,
)

DIALECTS = (
    Dialect(
        "transformers",
        r"^post_layernorm\.",
        prefixes=("vision_model.",),
        excludes=(r"^pre_layrnorm\.",),  # CLIP
        dropped=(r"^text_model\.", r"^logit_scale$", r"^logit_bias$"),
        is_original=True,
        text_table=NameTable(),
    ),
    Dialect(
        "timm",
        r"^blocks\.\d+\.attn\.qkv\.bias$",
        TIMM,
        requires=(r"^pos_embed$", r"^blocks\.\d+\.mlp\.fc1\.bias$"),
        # Of other vision transformers.
        excludes=(
            r"^(cls|reg|dist)_token$",
            r"^merger\.",
            r"\.gamma_[12]$",
            r"\.ls[12]\.",
            r"^norm_pre\.",
            r"\.(q|k)_norm\.",
        ),
        dropped=CLASSIFIER,
    ),
    Dialect("timm, NaFlex", r"^embeds\.pos_embed$", TIMM_NAFLEX, dropped=CLASSIFIER),
)

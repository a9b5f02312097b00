"""CLIP's dialects: how transformers, OpenCLIP and timm name its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nopad.checkpoints.conversions import DROP_AXES, DROP_AXIS, TRANSPOSED, NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Checkpoint, Dialect
from nopad.checkpoints.stored_tensor import StoredTensor

_LAYER, _ATTENTION = "encoder.layers.*", "encoder.layers.*.self_attn"


def _open_clip_blocks(file: str, model: str) -> list[Rename]:
    """The blocks of one tower, below a prefix in the file and one in the model."""
    block, layer = f"{file}transformer.resblocks.*", f"{model}{_LAYER}"
    return [
        Rename(f"{block}.ln_1.*", f"{layer}.layer_norm1.*"),
        *(split_qkv(f"{block}.attn.in_proj_{kind}", f"{model}{_ATTENTION}", kind) for kind in ("weight", "bias")),
        Rename(f"{block}.attn.out_proj.*", f"{model}{_ATTENTION}.out_proj.*"),
        Rename(f"{block}.ln_2.*", f"{layer}.layer_norm2.*"),
        Rename(f"{block}.mlp.c_fc.*", f"{layer}.mlp.fc1.*"),
        Rename(f"{block}.mlp.c_proj.*", f"{layer}.mlp.fc2.*"),
    ]


OPEN_CLIP = NameTable(
    Rename("visual.class_embedding", "embeddings.class_embedding"),
    Rename("visual.positional_embedding", "embeddings.position_embedding.weight"),
    Rename("visual.conv1.weight", "embeddings.patch_embedding.weight"),
    Rename("visual.ln_pre.*", "pre_layrnorm.*"),
    *_open_clip_blocks("visual.", ""),
    Rename("visual.ln_post.*", "post_layernorm.*"),
    Rename("visual.proj", "visual_projection.weight", reshape=TRANSPOSED),
)
OPEN_CLIP_TEXT = NameTable(
    Rename("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_open_clip_blocks("", "text_model."),
    Rename("ln_final.*", "text_model.final_layer_norm.*"),
    Rename("text_projection", "text_projection.weight", reshape=TRANSPOSED),
)
TIMM = NameTable(
    Rename("cls_token", "embeddings.class_embedding", reshape=DROP_AXES),
    Rename("pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
    Rename("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
    Rename("norm_pre.*", "pre_layrnorm.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.layer_norm1.*"),
    split_qkv("blocks.*.attn.qkv.*", _ATTENTION),
    Rename("blocks.*.attn.proj.*", f"{_ATTENTION}.out_proj.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.layer_norm2.*"),
    Rename("blocks.*.mlp.**", f"{_LAYER}.mlp.**"),
    Rename("norm.*", "post_layernorm.*"),
    Rename("head.weight", "visual_projection.weight"),
)


def timm_head_projects(config: Mapping[str, Any]) -> bool:
    """Whether the head of timm's model is the original's projection, and no classifier of tuned weights (`_ft_`)."""
    pretrained = config.get("pretrained_cfg")
    tag = pretrained.get("tag") if isinstance(pretrained, dict) else None
    return bool(config.get("num_classes")) and isinstance(tag, str) and tag != "" and "ft" not in tag.split("_")


def check_no_bias(checkpoint: Checkpoint, name: str, bias: StoredTensor) -> None:
    """Raise `ValueError` on a bias of timm's projection that is not zero."""
    if bias.read().any():
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {name}: expected zeros, since the original's projection has no bias and "
            f"config.json names the original's weights, got other values"
        )


def prepare_timm_head(checkpoint: Checkpoint) -> Checkpoint:
    """Without the classifier, and without the bias of a projection, which is zero.

    Raises:
        ValueError: a projection with another bias.
    """
    tensors = dict(checkpoint.tensors)
    head = {name: tensors.pop(name) for name in ("head.weight", "head.bias") if name in tensors}
    if timm_head_projects(checkpoint.config) and "head.weight" in head:
        if "head.bias" in head:
            check_no_bias(checkpoint, "head.bias", head["head.bias"])
        tensors["head.weight"] = head.pop("head.weight")
    return replace(checkpoint, tensors=tensors, left_out={**checkpoint.left_out, **head})


DIALECTS = (
    Dialect(
        "transformers",
        r"^pre_layrnorm\.",
        prefixes=("vision_model.",),
        dropped=(
            r"^text_(model|projection)\.",
            r"^logit_scale$",
            r"^classifier\.",
            r"^(vision_model\.)?embeddings\.position_ids$",  # 0, 1, 2, … in files of transformers < 4.31
        ),
        is_original=True,
        text_table=NameTable(),
    ),
    Dialect(
        "OpenCLIP",
        r"^visual\.transformer\.resblocks\.\d+\.attn\.in_proj_weight$",
        OPEN_CLIP,
        excludes=(r"^visual\.attn_pool\.",),  # Perception Encoder's
        dropped=(
            r"^(text|token_embedding|transformer|ln_final)\.",
            r"^(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask)$",
            r"^(input_resolution|context_length|vocab_size)$",  # OpenAI's
        ),
        text_table=OPEN_CLIP_TEXT,
        text_prefixes=("text.",),  # of its `CustomTextCLIP`
    ),
    Dialect(
        "timm",
        r"^norm_pre\.",
        TIMM,
        requires=(r"^cls_token$", r"^blocks\.\d+\.attn\.qkv\.bias$", r"^(norm|fc_norm)\."),
        # Of other vision transformers, among them Perception Encoder's, of which the plain ones have no final norm.
        excludes=(r"\.gamma_[12]$", r"\.ls[12]\.", r"\.(q|k)_norm\.", r"^reg_token$", r"^attn_pool\."),
        dropped=(r"^fc_norm\.",),
        prepare=prepare_timm_head,
    ),
)

"""C-RADIO's dialects: how NVIDIA and transformers name its tensors."""

from __future__ import annotations

from dataclasses import replace

from nopad.checkpoints.conversions import NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Checkpoint, Dialect

_BLOCK, _LAYER = "radio_model.model.blocks.*", "encoder.layer.*"
_GENERATOR = "radio_model.model.patch_generator"
_LINES = (
    Rename(f"{_GENERATOR}.embedder.**", "embeddings.patch_projection.**"),
    Rename(f"{_GENERATOR}.pos_embed", "embeddings.position_embedding"),
    Rename(f"{_GENERATOR}.cls_token.token", "embeddings.cls_register_token"),
    Rename("radio_model.input_conditioner.*", "input_conditioner.*"),
    Rename("radio_model.summary_idxs", "summary_idxs"),
    split_qkv(f"{_BLOCK}.attn.qkv.*", f"{_LAYER}.attention"),
    Rename(f"{_BLOCK}.attn.proj.**", f"{_LAYER}.attention.o_proj.**"),
    Rename(f"{_BLOCK}.norm1.*", f"{_LAYER}.norm1.*"),
    Rename(f"{_BLOCK}.norm2.*", f"{_LAYER}.norm2.*"),
    Rename(f"{_BLOCK}.mlp.**", f"{_LAYER}.mlp.**"),
)
# transformers saves files with all names of NVIDIA's but those of layer scales, which only some of NVIDIA's have.
_TRANSFORMERS = NameTable(
    *_LINES, *(Rename(f"{_BLOCK}.layer_scale{i}.lambda1", f"{_LAYER}.layer_scale{i}.lambda1") for i in (1, 2))
)
_NVIDIA = NameTable(*_LINES, *(Rename(f"{_BLOCK}.ls{i}.grandma", f"{_LAYER}.layer_scale{i}.lambda1") for i in (1, 2)))

_SIGNATURE = r"^radio_model\.model\.blocks\.\d+\.attn\.qkv\."
_SCALES = r"^radio_model\.model\.blocks\.\d+\.ls[12]\.grandma$"
EMBEDDINGS = r"^embeddings\.(cls_register_token|position_embedding|patch_projection\.\w+)$"
"""Names in memory that C-RADIO has and DINOv2, whose layers have the same names, has not."""


def _prepare(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out the statistics of the pixels in a larger model, whose processor normalises them."""
    if not checkpoint.prefix:
        return checkpoint
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if "input_conditioner." not in name}
    return replace(checkpoint, tensors=tensors)


# Registers of timm's model, which NVIDIA's replaces, heads for the teachers' features, statistics of the layers'
# features, and the patches of clips.
_DROPPED = (
    r"^radio_model\.model\.reg_token$",
    r"^radio_model\.(adaptors|inter_feature_normalizer)\.",
    r"^radio_model\.model\.patch_generator\.video_embedder\.",
    r"^embeddings\.video_patch_projection\.",
)
DIALECTS = (
    Dialect(
        "transformers",
        _SIGNATURE,
        _TRANSFORMERS,
        dropped=_DROPPED,
        excludes=(_SCALES,),
        is_original=True,
        prepare=_prepare,
    ),
    Dialect(
        "transformers, in memory",
        r"^encoder\.layer\.\d+\.attention\.q_proj\.",
        requires=(EMBEDDINGS,),
        dropped=_DROPPED,
        is_original=True,
        prepare=_prepare,
    ),
    Dialect("NVIDIA, layer scales", _SIGNATURE, _NVIDIA, requires=(_SCALES,), dropped=_DROPPED, prepare=_prepare),
)

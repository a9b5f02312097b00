"""AIMv2's dialects: how transformers, Apple and timm name its tensors."""

from __future__ import annotations

from typing import Any

from nopad.checkpoints.conversions import DROP_AXIS, NameTable, Rename, split_qkv
from nopad.checkpoints.formats import Dialect
from nopad.checkpoints.timm_config import CLASSIFIER

_LAYER = "encoder.layers.*"

_EARLY_TRANSFORMERS = NameTable(
    Rename("encoder.layers.*.attention.proj_out.*", f"{_LAYER}.attention.out_proj.*"),
    Rename("encoder.layers.*.ffn.fc1.*", f"{_LAYER}.ffn.gate_proj.*"),
    Rename("encoder.layers.*.ffn.fc3.*", f"{_LAYER}.ffn.up_proj.*"),
    Rename("encoder.layers.*.ffn.fc2.*", f"{_LAYER}.ffn.down_proj.*"),
)


def _apple_trunk(file: str, model: str) -> list[Rename]:
    """The blocks of one tower and its last norm, below a prefix in the file and one in the model."""
    block, layer = f"{file}trunk.blocks.*", f"{model}{_LAYER}"
    return [
        Rename(f"{block}.norm_1.*", f"{layer}.rms_norm1.*"),
        Rename(f"{block}.norm_2.*", f"{layer}.rms_norm2.*"),
        split_qkv(f"{block}.attn.qkv.*", f"{layer}.attention"),
        Rename(f"{block}.attn.proj.*", f"{layer}.attention.out_proj.*"),
        Rename(f"{block}.mlp.fc1.*", f"{layer}.ffn.gate_proj.*"),
        Rename(f"{block}.mlp.fc3.*", f"{layer}.ffn.up_proj.*"),
        Rename(f"{block}.mlp.fc2.*", f"{layer}.ffn.down_proj.*"),
        Rename(f"{file}trunk.post_trunk_norm.*", f"{model}rms_norm.*"),
    ]


_APPLE = NameTable(
    Rename("preprocessor.patchifier.proj.*", "embeddings.patch_embed.*"),
    Rename("preprocessor.patchifier.norm.*", "embeddings.rms_norm.*"),
    Rename("preprocessor.pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
    *_apple_trunk("", ""),
    Rename("head.k.*", "head.k_proj.*"),
    Rename("head.v.*", "head.v_proj.*"),
    Rename("head.linear.*", "head.output_proj.*"),
    Rename("image_projector.*", "visual_projection.*"),
)
_APPLE_TEXT = NameTable(
    Rename("text_encoder.preprocessor.text_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rename("text_encoder.preprocessor.positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *_apple_trunk("text_encoder.", "text_model."),
    Rename("text_projector.*", "text_projection.*"),
    Rename("log_logit_scale", "logit_scale"),
)
_OVIS2 = NameTable(Rename("embeddings.patch_embedding.*", "embeddings.patch_embed.*"))
_TIMM = NameTable(
    Rename("patch_embed.proj.*", "embeddings.patch_embed.*"),
    Rename("patch_embed.norm.*", "embeddings.rms_norm.*"),
    Rename("pos_embed", "embeddings.position_embedding.weight", reshape=DROP_AXIS),
    Rename("blocks.*.norm1.*", f"{_LAYER}.rms_norm1.*"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.rms_norm2.*"),
    split_qkv("blocks.*.attn.qkv.*", f"{_LAYER}.attention"),
    Rename("blocks.*.attn.proj.*", f"{_LAYER}.attention.out_proj.*"),
    Rename("blocks.*.mlp.fc1_g.*", f"{_LAYER}.ffn.gate_proj.*"),
    Rename("blocks.*.mlp.fc1_x.*", f"{_LAYER}.ffn.up_proj.*"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.ffn.down_proj.*"),
    Rename("norm.*", "rms_norm.*"),
)

# The vision tower of a composite checkpoint, and what its other tower and its loss bring.
_TOWER: dict[str, Any] = {
    "prefixes": ("vision_model.",),
    "dropped": (r"^text_model\.", r"^text_projection\.", r"^logit_scale$"),
}

DIALECTS = (
    Dialect(
        "transformers",
        r"^encoder\.layers\.\d+\.ffn\.(gate|up|down)_proj\.",
        excludes=(r"^embeddings\.patch_embedding\.",),
        is_original=True,
        text_table=NameTable(),
        **_TOWER,
    ),
    Dialect(
        "transformers' Ovis2",
        r"^embeddings\.patch_embedding\.weight$",
        _OVIS2,
        requires=(r"^encoder\.layers\.\d+\.ffn\.(gate|up|down)_proj\.",),
        prefixes=("transformer.",),
        dropped=(r"^head_(linear|norm)\.",),  # to tokens of the language model
    ),
    Dialect("early transformers", r"^encoder\.layers\.\d+\.ffn\.fc\d\.", _EARLY_TRANSFORMERS, **_TOWER),
    Dialect(
        "Apple",
        r"^trunk\.blocks\.\d+\.norm_[12]\.",
        _APPLE,
        prefixes=("image_encoder.",),
        dropped=(r"^text_encoder\.", r"^text_projector\.", r"^log_logit_scale$"),
        text_table=_APPLE_TEXT,
    ),
    Dialect(
        "timm", r"^blocks\.\d+\.mlp\.fc1_[gx]\.", _TIMM, excludes=(r"^cls_token$", r"\.gamma_1$"), dropped=CLASSIFIER
    ),
)

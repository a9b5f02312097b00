"""Reads timm's `config.json`: an architecture by its name, changes to it, and the preprocessing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from nopad.checkpoints.formats import Checkpoint
from nopad.counts import is_count
from nopad.preprocessing.config import values_and_filter

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    **{name: name for name in ("quick_gelu", "silu", "relu")},
}
"""timm's names, to those of transformers."""
NAMES = {"num_heads": "num_attention_heads", "attn_drop_rate": "attention_dropout", "act_layer": "hidden_act"}
"""Arguments of timm that most families read, to fields of transformers' configs."""
PLAIN_VIT = {
    **dict.fromkeys(("class_token", "no_embed_class", "pre_norm", "fc_norm", "pool_include_prefix"), False),
    **dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm", "dynamic_img_pad"), False),
    "final_norm": True,
    "pos_embed": "learn",
    "drop_path_rate": 0.0,
}
"""Arguments of timm's VisionTransformer with values that encoders here implement, where a family names no other."""
CLASSIFIER = (r"^head\.(weight|bias)$", r"^fc_norm\.")
"""Tensors of a classifier, which is no part of an encoder."""
_USUAL_CROP_PCT = 0.875  # timm's DEFAULT_CROP_PCT
# Arguments that tensor shapes give as well, that concern training or classes alone, or images of other sizes.
_NOT_NEEDED = """
img_size patch_size in_chans embed_dim depth mlp_ratio num_classes global_pool qkv_bias proj_bias init_values
weight_init fix_init head_init_scale drop_rate pos_drop_rate patch_drop_rate proj_drop_rate num_reg_tokens reg_tokens
swiglu_mlp swiglu_align_to dynamic_img_size ref_feat_shape pos_embed_grid_size out_features enable_patch_interpolator
"""


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is one of timm's."""
    return not config.keys().isdisjoint({"architecture", "model_args", "pretrained_cfg"})


def check_is_timm(checkpoint: Checkpoint) -> None:
    """Raise `ValueError` on tensors in timm's layout without timm's config, which says more than they do."""
    if not is_timm(checkpoint.config):
        raise ValueError(f"checkpoint {checkpoint.name!r}: a file in timm's layout needs timm's config.json beside it")


def read_model_args(
    checkpoint: Checkpoint,
    architectures: str,
    *,
    fixed: Mapping[str, Any],
    names: Mapping[str, str] = NAMES,
    required: bool = True,
) -> tuple[str, dict[str, Any]]:
    """An architecture of timm, and what `model_args` change of it.

    Args:
        checkpoint: with a config of timm's.
        architectures: a pattern that all of its name matches.
        fixed: arguments with the one value that is implemented.
        names: of further arguments, which are read, to the fields of transformers' config that they are.
        required: whether there has to be an architecture.

    Returns:
        The architecture's name, empty where the config does not have it, and the fields that the arguments are.

    Raises:
        ValueError: no or another architecture, an argument or an activation that is not implemented, another value
            of a fixed one, or two sides of a square that differ.
    """
    label = f"checkpoint {checkpoint.name!r}: config.json"
    architecture, arguments = checkpoint.config.get("architecture") or "", checkpoint.config.get("model_args") or {}
    is_missing = architecture == "" and not required
    if not is_missing and not (isinstance(architecture, str) and re.fullmatch(architectures, architecture)):
        raise ValueError(f"{label}: architecture: expected {architectures}, got {architecture!r:.80}")
    if not isinstance(arguments, dict):
        raise ValueError(f"{label}: model_args: expected a JSON object, got {arguments!r:.80}")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name, value in arguments.items():
        if name in fixed and value != fixed[name]:
            raise ValueError(f"{label}: model_args: {name}: expected {fixed[name]!r}, got {value!r:.80}")
    unread = sorted(arguments.keys() - names.keys() - fixed.keys() - set(_NOT_NEEDED.split()))
    if unread:
        raise ValueError(f"{label}: model_args: not implemented: {', '.join(unread)}")
    fields = {names[name]: arguments[name] for name in names if name in arguments}
    if "hidden_act" in fields:
        name = fields["hidden_act"]
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(f"{label}: act_layer: expected one of {', '.join(ACTIVATIONS)}, got {name!r:.80}")
        fields["hidden_act"] = ACTIVATIONS[name]
    return architecture, checkpoint.with_sides(fields)


def preprocessor_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """timm's preprocessing for a model, as a preprocessor config of transformers; `None` where the config has none.

    NaFlex models make their own sizes: theirs has none.
    """
    fields = config.get("pretrained_cfg", config)
    if not is_timm(config) or not isinstance(fields, dict):
        return None
    preprocessor = values_and_filter(fields)
    size = fields.get("input_size")
    if str(config.get("architecture")).startswith("naflexvit"):
        return {"image_processor_type": "Siglip2ImageProcessor", **preprocessor}
    if not isinstance(size, list) or len(size) != 3:
        return {"image_processor_type": "CLIPImageProcessor", "size": size, **preprocessor}
    sides = {"height": size[1], "width": size[2]}
    mode, share = fields.get("crop_mode") or "center", fields.get("crop_pct") or _USUAL_CROP_PCT
    if mode == "squash" and share == 1:
        return {"image_processor_type": "ViTImageProcessor", "size": sides, **preprocessor}
    if mode != "center" or not isinstance(share, int | float) or not share > 0:
        preprocessor |= {
            name: fields[name] for name in ("crop_mode", "crop_pct") if name in fields
        }  # refused by these names
    elif is_count(sides["width"]) and sides["width"] == sides["height"]:
        preprocessor |= {"size": {"shortest_edge": math.floor(sides["width"] / share)}}
    return {"image_processor_type": "CLIPImageProcessor", "size": sides, "crop_size": sides, **preprocessor}

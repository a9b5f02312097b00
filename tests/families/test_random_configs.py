"""Architectures drawn at random: features and gradients of many shapes and clips in one pack are the original's."""

from __future__ import annotations

import json
import random

import pytest
from originals import GRIDS, assert_gradients, assert_parity, read_by_original
from tiny_encoders import FAMILIES, tiny

import nopad

DRAWS = 3
ON_A_TABLE = (
    *("aimv2 with a head", "siglip", "clip", "metaclip2", "dinov2", "dinov2 gated", "tipsv2"),
    *("vit", "vit_mae", "ijepa", "pixio", "pe", "pe lang"),
)
"""Families whose positions are of an `image_size`."""
HEAD_SIZES = {
    **dict.fromkeys(("dinov3", "moonvit", "pixtral", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), (8, 16, 20)),
    **{"aimv2": (4, 20), "onevision": (32,), "pe": (16, 40)},
}
"""Of families that divide a head or the width into parts, and of `pe` among its pooling heads; others have any size."""
NORM_EPS = {"layer_norm_eps": (1e-6, 1e-2)}
ACTIVATIONS = {"hidden_act": ("gelu", "silu", "gelu_pytorch_tanh", "quick_gelu")}
BOTH = (False, True)
DINOV3 = {
    **{**NORM_EPS, "query_bias": BOTH, "value_bias": BOTH, "proj_bias": BOTH, "mlp_bias": BOTH},
    **{"num_register_tokens": (0, 3), "rope_theta": (10.0, 100.0), "pos_embed_rescale": (None,)},
}
"""Without the rescaled positions, which are drawn at random in training."""
FIELDS = {
    "aimv2": {**ACTIVATIONS, "rms_norm_eps": (1e-6, 1e-2), "qkv_bias": BOTH, "mlp_bias": BOTH},
    "siglip2": {**ACTIVATIONS, **NORM_EPS, "num_patches": (4, 9, 36), "vision_use_head": BOTH},
    "siglip": {**ACTIVATIONS, **NORM_EPS, "vision_use_head": BOTH},
    "clip": {**ACTIVATIONS, **NORM_EPS},
    "metaclip2": {**ACTIVATIONS, **NORM_EPS},
    "dinov2": {**ACTIVATIONS, **NORM_EPS, "mlp_ratio": (1, 3), "qkv_bias": BOTH},
    "dinov2 gated": {**NORM_EPS, "qkv_bias": BOTH},
    "tipsv2": {**NORM_EPS, "mlp_ratio": (1.5, 3)},
    "dinov3": {**ACTIVATIONS, **DINOV3},
    "dinov3 gated": DINOV3,
    "onevision": {**ACTIVATIONS, **NORM_EPS, "rope_theta": (10.0, 10000.0)},
    # transformers' class reads past a table that is no square.
    "moonvit": {**ACTIVATIONS, "pos_emb_height": (6,), "pos_emb_width": (6,)},
    "pixtral": {**ACTIVATIONS, "image_size": (20, 36)},
    "qwen2_vl": {**ACTIVATIONS, "mlp_ratio": (1, 3)},
    "qwen2_5_vl": {**ACTIVATIONS, "window_size": (4, 8, 12), "fullatt_block_indexes": ([], [0], [0, 2])},
    "qwen3_vl": {**ACTIVATIONS, "num_position_embeddings": (4, 36)},
    "qwen3_5": {**ACTIVATIONS, "num_position_embeddings": (4, 36)},
    "radio": {
        **{**ACTIVATIONS, **NORM_EPS, "mlp_ratio": (1.5, 3.0), "qkv_bias": BOTH, "max_img_size": (16, 28)},
        **{"num_cls_tokens": (3, 5), "num_registers": (0, 4), "summary_idxs": ([0], [2, 0, 1])},
    },
    "pe": {
        **ACTIVATIONS,
        **NORM_EPS,
        "use_class_token": BOTH,
        "use_layer_scale": BOTH,
        "rope_offset": (0, 1),
        "num_pooling_heads": (1, 4),
    },
    "vit": {**ACTIVATIONS, **NORM_EPS, "qkv_bias": BOTH},
    "vit_mae": {**ACTIVATIONS, **NORM_EPS, "qkv_bias": BOTH},
    "ijepa": {**ACTIVATIONS, **NORM_EPS, "qkv_bias": BOTH},
    "pixio": {**ACTIVATIONS, **NORM_EPS, "qkv_bias": BOTH, "mlp_ratio": (1, 3), "n_cls_tokens": (2, 5)},
}
"""Values of the fields beside sizes, of a variant without a line of its own those of the first word."""


def own_fields(family: str) -> dict:
    """The values of a family's own fields."""
    return FIELDS.get(family, FIELDS[family.split()[0]])


def drawn(family: str, seed: int) -> dict:
    """The fields of a config, the same every time."""
    draw = random.Random(f"{family} {seed}")
    kind = family.split()[0]
    heads, patch_size = draw.choice((1, 2, 3)), draw.choice((2, 3, 5))
    fields = {
        "num_attention_heads": heads,
        "hidden_size": heads * draw.choice(HEAD_SIZES.get(kind, (3, 8, 20))),
        "intermediate_size": draw.choice((24, 37)),
        "num_hidden_layers": draw.choice((1, 2, 3)),
        "patch_size": patch_size,
    }
    fields |= {name: draw.choice(values) for name, values in own_fields(family).items()}
    if family in ON_A_TABLE:
        fields["image_size"] = patch_size * draw.choice((2, 4, 7)) + draw.choice((0, 1))
    return fields


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_config_has_the_originals_features_and_gradients(tmp_path, family, seed):
    fields = drawn(family, seed)
    folder = tiny(family, tmp_path / "checkpoint", **fields)
    encoder, original = nopad.load(folder), read_by_original(family, folder)
    side = fields.get("image_size", 0) // fields["patch_size"]
    grids = [(1, side, side), (2, side, side)] if family == "aimv2 with a head" else GRIDS
    assert_parity(family, encoder, original, grids)
    assert_gradients(family, encoder.train(), original.train(), grids[-2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_change_the_config(tmp_path, family):
    """A name that the config does not have would be drawn in vain."""
    folder = tiny(family, tmp_path / "checkpoint")
    written = json.loads((folder / "config.json").read_text())
    read = nopad.load(folder).config.to_dict()  # transformers 5.17 does not write vision_use_head
    assert own_fields(family).keys() <= {*written, *read}

"""Perception Encoder's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

import math
import re
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.dialects.clip import timm_head_projects
from nopad.checkpoints.dialects.pe import OPEN_CLIP, TIMM
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.checkpoints.timm_config import check_is_timm, is_timm, read_model_args
from nopad.counts import is_count
from nopad.families.sizes import configs_by_name, size_fields


class PEPackingConfig(PreTrainedConfig):
    """The arguments of Meta's model, under the names that transformers' configs have, and what packing adds to it.

    Attributes:
        use_class_token: whether there is a CLS token.
        use_layer_scale: whether blocks have layer scales.
        use_final_norm: whether there is a norm behind the last layer.
        use_head: whether there is attention pooling.
        num_pooling_heads: attention heads of that.
        projection_dim: values of the projection into the image-text space, `None` without one.
        rope_theta: base of the rotary frequencies.
        rope_offset: number of the first row and column: 1 with a CLS token, which is at 0, in the published models.
        rope_grid_side: rows and columns of each image are scaled to a square of so many, as timm does; `None` without.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_mode: resample them `"bilinear"`, as Meta's code does, or `"bicubic"` as timm's.
        positions_antialias: and with antialiasing, as timm's.
    """

    model_type = "perception_encoder"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    layerscale_value: float = 0.1
    use_class_token: bool = True
    use_layer_scale: bool = False
    use_final_norm: bool = True
    use_head: bool = True
    num_pooling_heads: int = 8
    projection_dim: int | None = 1024
    rope_theta: float | int = 10000.0
    rope_offset: float | int = 1
    rope_grid_side: int | None = None
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_mode: str = "bilinear"
    positions_antialias: bool = False


_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
layer_norm_eps attention_dropout initializer_range layerscale_value use_class_token use_layer_scale use_final_norm
use_head num_pooling_heads projection_dim rope_theta rope_offset rope_grid_side patch_order positions positions_mode
positions_antialias
"""
_TIMM_ARCHITECTURES = r"vit_pe_(core|lang|spatial)_(tiny|small|base|large|gigantic)_patch(14|16)_(\d+)"
_TIMM_NAMES = {
    "num_heads": "num_attention_heads",
    "attn_drop_rate": "attention_dropout",
    "class_token": "use_class_token",
    "use_post_transformer_norm": "use_final_norm",
    "attn_pool_num_heads": "num_pooling_heads",
    "rope_temperature": "rope_theta",
    "rope_grid_offset": "rope_offset",
    "ref_feat_shape": "rope_grid_side",
}
_TIMM_FIXED = {
    **dict.fromkeys(("no_embed_class", "qk_norm", "scale_mlp", "scale_attn_inner", "use_post_norm"), False),
    **dict.fromkeys(("dynamic_img_pad", "use_fc_norm", "attn_only_layer_scale", "rope_rotate_half"), False),
    **dict.fromkeys(("use_pre_transformer_norm", "use_abs_pos_emb", "use_rot_pos_emb", "qkv_fused"), True),
    "attn_type": "rope",
    "rope_type": "cat",
    "rope_grid_indexing": "xy",
    "attn_pool_mlp_ratio": 4.0,
    "drop_path_rate": 0.0,
}
_TIMM_HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "gigantic": 16}
_OF_TIMM = (TIMM, OPEN_CLIP)
_KERNEL, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_PROJECTION, _LAYERS = "projection.weight", "transformer.resblocks."


def read_config(checkpoint: Checkpoint) -> PEPackingConfig:
    """The architecture: from a `config.json` of nopad's own or of timm's, else from the tensors.

    Raises:
        ValueError: a config of another architecture, tensors in timm's layout without its config, or tensors that no
            published model has.
    """
    checkpoint.check_model_type("timm_wrapper")  # transformers' class around timm's models
    is_own = checkpoint.vision_config.get("model_type") == PEPackingConfig.model_type
    if checkpoint.table in _OF_TIMM and not is_own:
        check_is_timm(checkpoint)
    if is_timm(checkpoint.config):
        fields = _read_timm_config(checkpoint)
    else:
        fields = read_fields(checkpoint, _NAMES.split())
    if not is_own:
        fields = {**_infer_from_tensors(checkpoint, fields), **fields}
    if checkpoint.table in _OF_TIMM:
        fields = {"positions_mode": "bicubic", "positions_antialias": True, **fields}
    return PEPackingConfig(**fields)


def _read_timm_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of timm's `config.json`; heads and the grid of the rotary embedding follow from the architecture."""
    architecture, fields = read_model_args(
        checkpoint, _TIMM_ARCHITECTURES, fixed=_TIMM_FIXED, names=_TIMM_NAMES, required=True
    )
    match = re.fullmatch(_TIMM_ARCHITECTURES, architecture)
    assert match is not None
    _, size, patch, image = match.groups()
    return {
        "num_attention_heads": _TIMM_HEADS[size],
        "rope_offset": 0 if size == "gigantic" else 1,
        "rope_grid_side": int(image) // int(patch),  # also where the argument is null, which timm leaves out
        **fields,
    }


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, 4)
    positions = checkpoint.shape(_POSITIONS, 2)[0]
    has_class_token = math.isqrt(positions) ** 2 != positions  # whose position is one more than the square of a side
    side = grid_side(positions - has_class_token, f"checkpoint {checkpoint.name!r}")
    has_head = any(name.startswith("attn_pool.") for name in checkpoint.tensors)
    has_norm = any(name.startswith("ln_post.") for name in checkpoint.tensors)
    if has_norm and not has_head and checkpoint.table not in _OF_TIMM:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected 'attn_pool' beside 'ln_post', as in PE core, or neither; "
            f"the image tower of an OpenCLIP model, which has these names without positions in its attention, is read "
            f"from the whole checkpoint alone"
        )
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": checkpoint.shape(f"{_LAYERS}0.mlp.c_fc.bias", 1)[0],
        "num_hidden_layers": checkpoint.count(_LAYERS),
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "use_class_token": has_class_token,
        "use_layer_scale": any(re.search(r"\.ls_[12]\.", name) for name in checkpoint.tensors),
        "use_final_norm": has_head or has_norm,
        "use_head": has_head,
        "projection_dim": _read_projection_dim(checkpoint),
        "rope_offset": int(has_class_token),
    }
    if "num_attention_heads" not in config_fields:
        heads = {width: heads for width, heads, *_ in _SIZES.values()}
        fields["num_attention_heads"] = checkpoint.num_heads_by_width(hidden_size, heads)
    return fields


def _read_projection_dim(checkpoint: Checkpoint) -> int | None:
    """Width of the projection by its tensor, else by timm's config; `None` without one."""
    if _PROJECTION in checkpoint.tensors:
        return checkpoint.shape(_PROJECTION, 2)[0]
    return checkpoint.config["num_classes"] if timm_head_projects(checkpoint.config) else None


def check_config(config: PEPackingConfig) -> None:
    """Check what `PackedEncoder` does not.

    Raises:
        ValueError: pooling heads that do not fill the width, or a grid or a number of the first row that describe no
            model.
    """
    if not is_count(config.num_pooling_heads, 1) or config.hidden_size % config.num_pooling_heads:
        raise ValueError(
            f"num_pooling_heads: expected a divisor of hidden_size {config.hidden_size}, got "
            f"{config.num_pooling_heads!r:.80}"
        )
    side = config.rope_grid_side
    if side is not None and not is_count(side, 1):
        raise ValueError(f"rope_grid_side: expected an integer ≥ 1 or null, got {side!r:.80}")
    if type(config.rope_offset) not in (int, float):
        raise ValueError(f"rope_offset: expected a number, got {config.rope_offset!r:.80}")


# Width, heads, layers, feed-forward width, width of the image-text space.
_SIZES = {
    "T": (192, 3, 12, 768, 512),
    "S": (384, 6, 12, 1536, 512),
    "B": (768, 12, 12, 3072, 1024),
    "L": (1024, 16, 24, 4096, 1024),
    "G": (1536, 16, 50, 8960, 1280),
}
# Kind, size, patch, image: names.
_MODELS = {
    ("Core", "T", 16, 384): "facebook/PE-Core-T16-384",
    ("Core", "S", 16, 384): "facebook/PE-Core-S16-384",
    ("Core", "B", 16, 224): "facebook/PE-Core-B16-224",
    ("Core", "L", 14, 336): "facebook/PE-Core-L14-336",
    ("Core", "G", 14, 448): "facebook/PE-Core-G14-448",
    ("Lang", "L", 14, 448): "facebook/PE-Lang-L14-448 facebook/PE-Lang-L14-448-Tiling",
    ("Lang", "G", 14, 448): "facebook/PE-Lang-G14-448 facebook/PE-Lang-G14-448-Tiling",
    ("Spatial", "T", 16, 512): "facebook/PE-Spatial-T16-512",
    ("Spatial", "S", 16, 512): "facebook/PE-Spatial-S16-512",
    ("Spatial", "B", 16, 512): "facebook/PE-Spatial-B16-512",
    ("Spatial", "L", 14, 448): "facebook/PE-Spatial-L14-448",
    ("Spatial", "G", 14, 448): "facebook/PE-Spatial-G14-448",
}


def _config(name: str, kind: str, size: str, patch_size: int, image_size: int) -> dict[str, Any]:
    *sizes, projection_dim = _SIZES[size]
    is_core, has_class_token = kind == "Core", size != "G"
    fields = {
        **size_fields(*sizes),
        "image_size": image_size,
        "patch_size": patch_size,
        "use_class_token": has_class_token,
        "use_layer_scale": kind == "Lang" or (kind, size) == ("Spatial", "G"),
        "use_final_norm": is_core,
        "use_head": is_core,
        "projection_dim": projection_dim if is_core else None,
        "rope_offset": int(has_class_token),
    }
    if kind == "Lang":  # without the last layers
        fields["num_hidden_layers"] = {"L": 23, "G": 47}[size]
    return fields


PUBLISHED = configs_by_name(_MODELS, _config)

"""Checkpoints of DINOv2 and TIPSv2: the configs, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
from transformers.models.tipsv2.configuration_tipsv2 import Tipsv2VisionConfig

from nopad.checkpoints.config_json import BACKBONE_FIELDS, read_fields
from nopad.checkpoints.dialects.dinov2 import TIMM, TIMM_REGISTERS
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.checkpoints.timm_config import NAMES, PLAIN_VIT, check_is_timm, is_timm, read_model_args
from nopad.families.sizes import configs_by_name, swiglu_size

HEAD_DIM = 64
"""Head size of every published DINOv2, for files without a config."""


class DINOv2PackingConfig(Dinov2Config):
    """transformers' config of checkpoints without registers and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: resample them as timm does, not as transformers does.
    """

    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = False


class DINOv2WithRegistersPackingConfig(Dinov2WithRegistersConfig):
    """transformers' config of checkpoints with registers and what packing adds to it.

    Attributes:
        use_mask_token: always; this config of transformers does not have it.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: antialias them, as transformers and timm do.
    """

    use_mask_token: bool = True
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = True


class TIPSv2PackingConfig(Tipsv2VisionConfig):
    """transformers' config of TIPSv2's image encoder and what packing adds to it.

    Attributes:
        use_mask_token: always; this config of transformers does not have it.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
        positions_antialias: antialias them, as transformers and timm do.
        positions_mode: how they are resampled, `"bicubic"` as timm does.
    """

    use_mask_token: bool = True
    patch_order: str = "hwc"
    positions: str = "resample"
    positions_antialias: bool = True
    positions_mode: str = "bilinear"


DINOv2Configs = DINOv2PackingConfig | DINOv2WithRegistersPackingConfig | TIPSv2PackingConfig
_CONFIG_CLASSES = {
    kind.model_type: kind for kind in (DINOv2PackingConfig, DINOv2WithRegistersPackingConfig, TIPSv2PackingConfig)
}


def num_registers(config: DINOv2Configs) -> int | None:
    """Number of register tokens, `None` of a class that has no parameter for them."""
    return None if isinstance(config, DINOv2PackingConfig) else config.num_register_tokens


_COMMON_NAMES = """
hidden_size num_hidden_layers num_attention_heads mlp_ratio hidden_act hidden_dropout_prob attention_probs_dropout_prob
initializer_range layer_norm_eps image_size patch_size num_channels qkv_bias layerscale_value drop_path_rate
use_swiglu_ffn use_mask_token patch_order positions positions_antialias positions_mode
"""
_TIMM_NAMES = {**NAMES, "attn_drop_rate": "attention_probs_dropout_prob"}
_TIMM_ARCHITECTURES = r"vit_(small|base|large|so400m|giant)_patch14((_reg4)?_dinov2|_reg1_tipsv2)"
_TIMM_HEADS = {"small": 6, "base": 12, "large": 16, "so400m": 16, "giant": 24}
_KERNEL, _POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
_REGISTERS, _FIRST = "embeddings.register_tokens", "encoder.layer.0"


def read_config(checkpoint: Checkpoint) -> DINOv2Configs:
    """The architecture: transformers' from its `config.json`, where what is absent is a default, else from the tensors.

    Raises:
        ValueError: no `config.json`, and shapes that no published model has.
    """
    checkpoint.check_model_type(*_CONFIG_CLASSES)
    config_class = _CONFIG_CLASSES.get(checkpoint.vision_config.get("model_type", ""))
    names = (*_COMMON_NAMES.split(), "num_register_tokens")
    if is_timm(checkpoint.config):
        fields = _read_timm(checkpoint)
    else:
        fields = read_fields(checkpoint, names, unused=BACKBONE_FIELDS)
    if config_class is None:
        config_class = _class_of_tensors(checkpoint)
        fields = {**_infer_from_tensors(checkpoint, fields, config_class), **fields}
    fields = {name: value for name, value in fields.items() if hasattr(config_class, name)}
    return config_class(**fields)


def _class_of_tensors(checkpoint: Checkpoint) -> type[DINOv2Configs]:
    """The class of a config that does not name it: where it names no architecture of timm's, TIPSv2 has one register.

    Published DINOv2 has four or none.

    Raises:
        ValueError: timm's names without its config.
    """
    if checkpoint.table in (TIMM, TIMM_REGISTERS):
        check_is_timm(checkpoint)
    if _REGISTERS not in checkpoint.tensors:
        return DINOv2PackingConfig
    architecture = checkpoint.config.get("architecture")
    is_tipsv2 = "tipsv2" in architecture if architecture else checkpoint.shape(_REGISTERS, ndim=3)[1] == 1
    return TIPSv2PackingConfig if is_tipsv2 else DINOv2WithRegistersPackingConfig


def _read_timm(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields that timm's `config.json` has.

    Raises:
        ValueError: no architecture, or one with registers that the tensors do not have; see also `read_model_args`.
    """
    with_registers = checkpoint.table is TIMM_REGISTERS
    fixed = {**PLAIN_VIT, "class_token": True, "no_embed_class": with_registers}
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=fixed, names=_TIMM_NAMES)
    if with_registers != ("_reg" in architecture):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: tensor 'reg_token' is {'unexpected' if with_registers else 'missing'}, "
            f"since the architecture in config.json is {architecture!r}"
        )
    heads = _TIMM_HEADS[architecture.split("_")[1]]
    return {"num_attention_heads": heads, "positions_antialias": True, "positions_mode": "bicubic"} | fields


def _infer_from_tensors(
    checkpoint: Checkpoint, config_fields: dict[str, Any], config_class: type[DINOv2Configs]
) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, ndim=4)
    gated = f"{_FIRST}.mlp.gate_proj.weight" in checkpoint.tensors
    mlp_size = checkpoint.shape(f"{_FIRST}.mlp.{'gate_proj' if gated else 'fc1'}.weight")[0]
    mlp_ratio = _mlp_ratio(hidden_size, mlp_size, gated=gated, whole=config_class is not TIPSv2PackingConfig)
    if mlp_ratio is None and "mlp_ratio" not in config_fields:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected a feed-forward layer of a whole number of times the width "
            f"{hidden_size}{', of which a gated one has two thirds' if gated else ''}, got {mlp_size}"
        )
    num_positions = checkpoint.shape(_POSITIONS, ndim=3)[1] - 1  # without that of CLS
    side = grid_side(num_positions, f"checkpoint {checkpoint.name!r}")
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "num_hidden_layers": checkpoint.count("encoder.layer."),
        "qkv_bias": any(name.endswith(".attention.q_proj.bias") for name in checkpoint.tensors),
        "use_swiglu_ffn": gated,
        "use_mask_token": "embeddings.mask_token" in checkpoint.tensors,
        "num_register_tokens": checkpoint.shape(_REGISTERS, ndim=3)[1] if _REGISTERS in checkpoint.tensors else 0,
        **({} if mlp_ratio is None else {"mlp_ratio": mlp_ratio}),
    }
    if "num_attention_heads" in config_fields:
        return fields
    if config_class is TIPSv2PackingConfig:
        heads = {width: heads for width, _, heads, _ in _TIPSV2_SIZES.values()}
        return fields | {"num_attention_heads": checkpoint.num_heads_by_width(hidden_size, heads)}
    return fields | {"num_attention_heads": checkpoint.num_heads(hidden_size, HEAD_DIM)}


def _mlp_ratio(hidden_size: int, mlp_size: int, *, gated: bool, whole: bool) -> float | None:
    """`mlp_ratio` of a feed-forward width, `None` where no whole number is it and a `whole` one is needed."""
    sizes = {ratio: hidden_size * ratio for ratio in range(1, 2 + 2 * mlp_size // hidden_size)}
    ratios = [ratio for ratio, size in sizes.items() if mlp_size == (swiglu_size(size) if gated else size)]
    fraction = None if whole or gated else mlp_size / hidden_size
    return ratios[0] if ratios else fraction


_SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "giant": (1536, 40, 24)}
"""`hidden_size`, `num_hidden_layers`, `num_attention_heads`"""
_MODELS = {(kind, size): f"facebook/{kind}-{size}" for kind in ("dinov2", "dinov2-with-registers") for size in _SIZES}


def _config(name: str, kind: str, size: str) -> dict[str, Any]:
    hidden_size, num_layers, num_heads = _SIZES[size]
    registers = {"num_register_tokens": 4, "model_type": DINOv2WithRegistersPackingConfig.model_type}
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "mlp_ratio": 4,
        "use_swiglu_ffn": size == "giant",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 518,
        "patch_size": 14,
        "num_channels": 3,
        **(registers if kind == "dinov2-with-registers" else {}),
    }


_TIPSV2_SIZES = {
    "b14": (768, 12, 12, 4),
    "l14": (1024, 24, 16, 4),
    "so400m14": (1152, 27, 16, 4304 / 1152),
    "g14": (1536, 40, 24, 4),
}
"""`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `mlp_ratio`"""
_TIPSV2_MODELS = {(size,): f"google/tipsv2-{size}" for size in _TIPSV2_SIZES}


def _tipsv2_config(name: str, size: str) -> dict[str, Any]:
    hidden_size, num_layers, num_heads, mlp_ratio = _TIPSV2_SIZES[size]
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "mlp_ratio": mlp_ratio,
        "use_swiglu_ffn": size == "g14",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 448,
        "patch_size": 14,
        "num_channels": 3,
        "num_register_tokens": 1,
        "model_type": TIPSv2PackingConfig.model_type,
    }


PUBLISHED = configs_by_name(_MODELS, _config) | configs_by_name(_TIPSV2_MODELS, _tipsv2_config)

"""DINOv2's checkpoints: the configs, the dialects of tensor names, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.conversions import NameTable, Rename, split_rows
from nopad.checkpoints.formats import Checkpoint, Dialect, grid_side

HEAD_DIM = 64
"""Head size of every published model, for files without a config."""


class DINOv2PackingConfig(Dinov2Config):
    """transformers' config of checkpoints without registers and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
    """

    patch_order: str = "hwc"
    positions: str = "resample"


class DINOv2WithRegistersPackingConfig(Dinov2WithRegistersConfig):
    """transformers' config of checkpoints with registers and what packing adds to it.

    Attributes:
        use_mask_token: always; this config of transformers does not have it.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
    """

    use_mask_token: bool = True
    patch_order: str = "hwc"
    positions: str = "resample"


DINOv2Configs = DINOv2PackingConfig | DINOv2WithRegistersPackingConfig


def trained_grid(config: DINOv2Configs) -> tuple[int, int]:
    """`(rows, columns)` of the grid that positions were learned on."""
    side: int = config.image_size // config.patch_size  # pyright: ignore[reportOperatorIssue]
    return side, side


def swiglu_size(mlp_size: int) -> int:
    """Width of a gated feed-forward layer in place of a plain one: two thirds, rounded up to a multiple of 8."""
    return (int(mlp_size * 2 / 3) + 7) // 8 * 8


_LAYER, _ATTENTION = "encoder.layer.*", "encoder.layer.*.attention"
_GATE_UP = [f"{_LAYER}.mlp.{part}_proj.*" for part in ("gate", "up")]

# transformers has had names of its own in memory since 5.18; its files have kept these.
_PUBLISHED_NAMES = NameTable(
    Rename(f"{_ATTENTION}.attention.query.**", f"{_ATTENTION}.q_proj.**"),
    Rename(f"{_ATTENTION}.attention.key.**", f"{_ATTENTION}.k_proj.**"),
    Rename(f"{_ATTENTION}.attention.value.**", f"{_ATTENTION}.v_proj.**"),
    Rename(f"{_ATTENTION}.output.dense.**", f"{_ATTENTION}.o_proj.**"),
    Rename(f"{_LAYER}.mlp.weights_in.*", *_GATE_UP, reshape=split_rows(2)),
    Rename(f"{_LAYER}.mlp.weights_out.**", f"{_LAYER}.mlp.down_proj.**"),
)
_META = NameTable(
    Rename("cls_token", "embeddings.cls_token"),
    Rename("register_tokens", "embeddings.register_tokens"),
    Rename("mask_token", "embeddings.mask_token"),
    Rename("pos_embed", "embeddings.position_embeddings"),
    Rename("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    Rename("blocks.*.norm1.*", f"{_LAYER}.norm1.*"),
    Rename("blocks.*.attn.qkv.*", *(f"{_ATTENTION}.{part}_proj.*" for part in "qkv"), reshape=split_rows(3)),
    Rename("blocks.*.attn.proj.*", f"{_ATTENTION}.o_proj.*"),
    Rename("blocks.*.ls1.gamma", f"{_LAYER}.layer_scale1.lambda1"),
    Rename("blocks.*.norm2.*", f"{_LAYER}.norm2.*"),
    Rename("blocks.*.mlp.fc1.*", f"{_LAYER}.mlp.fc1.*"),
    Rename("blocks.*.mlp.fc2.*", f"{_LAYER}.mlp.fc2.*"),
    Rename("blocks.*.mlp.w12.*", *_GATE_UP, reshape=split_rows(2)),
    Rename("blocks.*.mlp.w3.*", f"{_LAYER}.mlp.down_proj.*"),
    Rename("blocks.*.ls2.gamma", f"{_LAYER}.layer_scale2.lambda1"),
    Rename("norm.*", "layernorm.*"),
)

_TRANSFORMERS: dict[str, Any] = {
    "requires": (r"^encoder\.layer\.\d+\.layer_scale1\.lambda1$",),
    "prefixes": ("dinov2.", "dinov2_with_registers."),
    "dropped": (r"^classifier\.",),
    "is_original": True,
}

DIALECTS = (
    Dialect("transformers", r"^encoder\.layer\.\d+\.attention\.attention\.query\.", _PUBLISHED_NAMES, **_TRANSFORMERS),
    Dialect("transformers, in memory", r"^encoder\.layer\.\d+\.attention\.q_proj\.", **_TRANSFORMERS),
    Dialect(
        "Meta",
        r"^blocks\.\d+\.ls1\.gamma$",
        _META,
        requires=(r"^pos_embed$", r"^mask_token$"),  # which timm's files do not have
    ),
)

_COMMON_NAMES = """
hidden_size num_hidden_layers num_attention_heads mlp_ratio hidden_act hidden_dropout_prob attention_probs_dropout_prob
initializer_range layer_norm_eps image_size patch_size num_channels qkv_bias layerscale_value drop_path_rate
use_swiglu_ffn use_mask_token patch_order positions
"""
_OF_BACKBONES = ("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names")
_KERNEL, _POSITIONS = "embeddings.patch_embeddings.projection.weight", "embeddings.position_embeddings"
_REGISTERS, _FIRST = "embeddings.register_tokens", "encoder.layer.0"


def read_config(checkpoint: Checkpoint) -> DINOv2Configs:
    """The architecture: transformers' from its `config.json`, where what is absent is a default, else from the tensors.

    Raises:
        ValueError: no `config.json`, and shapes that no published model has.
    """
    config_classes = {kind.model_type: kind for kind in (DINOv2PackingConfig, DINOv2WithRegistersPackingConfig)}
    checkpoint.check_model_type(*config_classes)
    config_class = config_classes.get(checkpoint.vision_config.get("model_type", ""))
    names = (*_COMMON_NAMES.split(), "num_register_tokens")
    fields = read_fields(checkpoint, {name: name for name in names}, unused=_OF_BACKBONES)
    if config_class is None:
        with_registers = _REGISTERS in checkpoint.tensors
        config_class = DINOv2WithRegistersPackingConfig if with_registers else DINOv2PackingConfig
        fields = {**_infer_from_tensors(checkpoint, fields), **fields}
    if config_class is DINOv2PackingConfig:
        fields.pop("num_register_tokens", None)
    fields |= {name: checkpoint.side(name, fields[name]) for name in ("image_size", "patch_size") if name in fields}
    return config_class(**fields)


def _infer_from_tensors(checkpoint: Checkpoint, config_fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config from the shapes of the tensors; `config_fields` are those that `config.json` has."""
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, ndim=4)
    gated = f"{_FIRST}.mlp.gate_proj.weight" in checkpoint.tensors
    mlp_size = checkpoint.shape(f"{_FIRST}.mlp.{'gate_proj' if gated else 'fc1'}.weight")[0]
    mlp_sizes = {ratio: hidden_size * ratio for ratio in range(1, 2 + 2 * mlp_size // hidden_size)}
    ratios = [ratio for ratio, size in mlp_sizes.items() if mlp_size == (swiglu_size(size) if gated else size)]
    if not ratios and "mlp_ratio" not in config_fields:
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
        "qkv_bias": f"{_FIRST}.attention.q_proj.bias" in checkpoint.tensors,
        "use_swiglu_ffn": gated,
        "use_mask_token": "embeddings.mask_token" in checkpoint.tensors,
        "num_register_tokens": checkpoint.shape(_REGISTERS, ndim=3)[1] if _REGISTERS in checkpoint.tensors else 0,
        **({"mlp_ratio": ratios[0]} if ratios else {}),
    }
    if "num_attention_heads" not in config_fields:
        fields["num_attention_heads"] = checkpoint.num_heads(hidden_size, HEAD_DIM)
    return fields


def _published() -> dict[str, dict[str, Any]]:
    sizes = {  # hidden_size, num_hidden_layers, num_attention_heads
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
        "giant": (1536, 40, 24),
    }
    models = {}
    registers = {"num_register_tokens": 4, "model_type": DINOv2WithRegistersPackingConfig.model_type}
    for kind, more in (("dinov2", {}), ("dinov2-with-registers", registers)):
        for size, (hidden_size, num_layers, num_heads) in sizes.items():
            models[f"facebook/{kind}-{size}"] = {
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
                **more,
            }
    return models


PUBLISHED = _published()

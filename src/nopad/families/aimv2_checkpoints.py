"""AIMv2's checkpoints: the config, the dialects of tensor names, and the published models."""

from __future__ import annotations

import math
from typing import Any

from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig

from nopad.checkpoint import Checkpoint, Dialect, FlattenPatchKernel, Unstack


class AIMv2PackingConfig(Aimv2VisionConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        projection_dim: width of the image-text space, `None` without a projection.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
    """

    projection_dim: int | None = None
    patch_order: str = "hwc"
    positions: str = "resample"


def trained_grid(config: Aimv2VisionConfig) -> tuple[int, int]:
    """`(rows, columns)` of the grid that positions were learned on."""
    side: int = config.image_size // config.patch_size  # pyright: ignore[reportOperatorIssue]
    return side, side


def _transformers() -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter("embeddings.patch_embed.weight", "embeddings.proj.weight", [FlattenPatchKernel()]),
        WeightRenaming("embeddings.patch_embed.bias", "embeddings.proj.bias"),
        WeightRenaming("embeddings.rms_norm", "embeddings.norm"),
        WeightRenaming("embeddings.position_embedding.weight", "embeddings.position_embedding"),
        WeightRenaming(r"^encoder\.layers", "^layers"),
        WeightRenaming("rms_norm1", "norm1"),
        WeightRenaming("rms_norm2", "norm2"),
        WeightConverter(
            ["attention.q_proj", "attention.k_proj", "attention.v_proj"], "attention.qkv", [Concatenate(dim=0)]
        ),
        WeightRenaming("attention.out_proj", "attention.proj"),
        WeightConverter(["ffn.gate_proj", "ffn.up_proj"], "mlp.gate_up", [Concatenate(dim=0)]),
        WeightRenaming("ffn.down_proj", "mlp.down"),
        WeightRenaming(r"^rms_norm", "^norm"),
        WeightConverter(["head.k_proj", "head.v_proj"], "head.kv", [Concatenate(dim=0)]),
        WeightRenaming("head.output_proj", "head.proj"),
        WeightRenaming("^visual_projection", "^projection"),
    ]


def _early_transformers() -> list[WeightConverter | WeightRenaming]:
    # The converters see names after the renamings, so the early names need converters of their own.
    replaced = ("attention.out_proj", "ffn.gate_proj", "ffn.down_proj")
    return [
        *(item for item in _transformers() if item.source_patterns[0] not in replaced),
        WeightRenaming("attention.proj_out", "attention.proj"),
        WeightConverter(["ffn.fc1", "ffn.fc3"], "mlp.gate_up", [Concatenate(dim=0)]),
        WeightRenaming("ffn.fc2", "mlp.down"),
    ]


def _apple() -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter("preprocessor.patchifier.proj.weight", "embeddings.proj.weight", [FlattenPatchKernel()]),
        WeightRenaming("preprocessor.patchifier.proj.bias", "embeddings.proj.bias"),
        WeightRenaming("preprocessor.patchifier.norm", "embeddings.norm"),
        WeightConverter("preprocessor.pos_embed", "embeddings.position_embedding", [Unstack()]),
        WeightRenaming(r"^trunk\.blocks", "^layers"),
        WeightRenaming("norm_1", "norm1"),
        WeightRenaming("norm_2", "norm2"),
        WeightRenaming("attn.qkv", "attention.qkv"),
        WeightRenaming("attn.proj", "attention.proj"),
        WeightConverter(["mlp.fc1", "mlp.fc3"], "mlp.gate_up", [Concatenate(dim=0)]),
        WeightRenaming("mlp.fc2", "mlp.down"),
        WeightRenaming(r"^trunk\.post_trunk_norm", "^norm"),
        WeightConverter(["head.k", "head.v"], "head.kv", [Concatenate(dim=0)]),
        WeightRenaming("head.linear", "head.proj"),
        WeightRenaming("^image_projector", "^projection"),
    ]


def _timm() -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter(r"^patch_embed\.proj\.weight", "^embeddings.proj.weight", [FlattenPatchKernel()]),
        WeightRenaming(r"^patch_embed\.proj\.bias", "^embeddings.proj.bias"),
        WeightRenaming(r"^patch_embed\.norm", "^embeddings.norm"),
        WeightConverter("^pos_embed", "^embeddings.position_embedding", [Unstack()]),
        WeightRenaming("^blocks", "^layers"),
        WeightRenaming("attn.qkv", "attention.qkv"),
        WeightRenaming("attn.proj", "attention.proj"),
        WeightConverter(["mlp.fc1_g", "mlp.fc1_x"], "mlp.gate_up", [Concatenate(dim=0)]),
        WeightRenaming("mlp.fc2", "mlp.down"),
    ]


# The vision tower of a composite checkpoint, and what its other tower and its loss bring.
_TOWER: dict[str, Any] = {
    "prefixes": ("vision_model.",),
    "dropped": (r"^text_model\.", r"^text_projection\.", r"^logit_scale$"),
}

DIALECTS = (
    Dialect(
        "transformers",
        r"^encoder\.layers\.\d+\.ffn\.(gate|up|down)_proj\.",
        _transformers,
        is_original=True,
        **_TOWER,
    ),
    Dialect("early transformers", r"^encoder\.layers\.\d+\.ffn\.fc\d\.", _early_transformers, **_TOWER),
    Dialect(
        "Apple",
        r"^trunk\.blocks\.\d+\.norm_[12]\.",
        _apple,
        prefixes=("image_encoder.",),
        dropped=(r"^text_encoder\.", r"^text_projector\.", r"^log_logit_scale$"),
    ),
    Dialect("timm", r"^blocks\.\d+\.mlp\.fc1_[gx]\.", _timm),
)

# Where each dialect keeps what tells the architecture: blocks, patch kernel, positions, gate matrix.
_PLACES = {
    "transformers": (
        "encoder.layers.",
        "embeddings.patch_embed",
        "embeddings.position_embedding.weight",
        "ffn.gate_proj",
    ),
    "early transformers": (
        "encoder.layers.",
        "embeddings.patch_embed",
        "embeddings.position_embedding.weight",
        "ffn.fc1",
    ),
    "Apple": ("trunk.blocks.", "preprocessor.patchifier.proj", "preprocessor.pos_embed", "mlp.fc1"),
    "timm": ("blocks.", "patch_embed.proj", "pos_embed", "mlp.fc1_g"),
}

# What config.json may say, by the names of transformers and of Apple's own flat config.
_SAME_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout rms_norm_eps qkv_bias mlp_bias initializer_range use_head is_native patch_order projection_dim
positions
"""
_CONFIG_NAMES = {name: name for name in _SAME_NAMES.split()} | {"use_bias": "mlp_bias"}


def read_config(checkpoint: Checkpoint, dialect: Dialect) -> AIMv2PackingConfig:
    """The architecture, from tensor shapes and from `config.json` where there is one.

    Tensors say whether there is a head, a projection or a position table only where the config is silent: Apple's flat
    config is, and read by transformers it would give a random head and random positions.

    Raises:
        ValueError: no config and shapes that no published AIMv2 has.
    """
    names = checkpoint.tensors
    blocks, kernel, positions, gate = _PLACES[dialect.name]
    hidden_size, channels, patch_size, _ = checkpoint.shape(f"{kernel}.weight")
    checkpoint.check_model_type("aimv2", "aimv2_vision_model")
    says = checkpoint.vision_config
    projections = [
        tensor
        for name, tensor in names.items()
        if name.endswith(("image_projector.weight", "visual_projection.weight"))
    ]
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "num_hidden_layers": checkpoint.count(blocks),
        "is_native": positions not in names,
        "use_head": "head.cls_token" in names,
        "qkv_bias": any(name.endswith(("q_proj.bias", "qkv.bias")) for name in names),
        "mlp_bias": any(name.endswith(f"{gate}.bias") for name in names),
        "projection_dim": projections[0].shape[0] if projections else None,
    }
    if "intermediate_size" not in says:
        fields["intermediate_size"] = checkpoint.shape(f"{blocks}0.{gate}.weight")[0]
    if positions in names and "image_size" not in says:
        number = checkpoint.shape(positions)[-2]
        side = math.isqrt(number)
        if side**2 != number:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: {number} learned positions are no square; add config.json"
            )
        fields["image_size"] = side * patch_size
    fields |= {_CONFIG_NAMES[name]: value for name, value in says.items() if name in _CONFIG_NAMES}
    fields |= {name: checkpoint.side(name, fields[name]) for name in ("image_size", "patch_size") if name in fields}
    # transformers may leave its defaults out of a config of its own, as SigLIP's do.
    own = AIMv2PackingConfig.model_type in (says.get("model_type"), checkpoint.config.get("model_type"))
    if "num_attention_heads" not in fields and not own:
        if hidden_size % 128:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: where config.json does not tell num_attention_heads, heads are 128 "
                f"wide as in every published AIMv2, but its width is {hidden_size}; add it to config.json"
            )
        fields["num_attention_heads"] = hidden_size // 128
    return AIMv2PackingConfig(**fields)


def _published() -> dict[str, dict[str, Any]]:
    sizes = {"large": (1024, 8, 2816), "huge": (1536, 12, 4096), "1B": (2048, 16, 5632), "3B": (3072, 24, 8192)}
    only_large = ("native", "224-distilled", "336-distilled", "224-lit")
    models = {}
    for size, (hidden_size, num_heads, intermediate_size) in sizes.items():
        for variant in ("224", "336", "448", *(only_large if size == "large" else ())):
            lit, native = variant.endswith("lit"), variant == "native"
            models[f"apple/aimv2-{size}-patch14-{variant}"] = {
                "hidden_size": hidden_size,
                "intermediate_size": intermediate_size,
                "num_hidden_layers": 24,
                "num_attention_heads": num_heads,
                "num_channels": 3,
                "image_size": 224 if native else int(variant[:3]),
                "patch_size": 14,
                "hidden_act": "silu",
                "rms_norm_eps": 1e-5,
                "qkv_bias": False,
                "mlp_bias": False,
                "use_head": lit,
                "is_native": native,
                "projection_dim": 768 if lit else None,
            }
    return models


PUBLISHED = _published()

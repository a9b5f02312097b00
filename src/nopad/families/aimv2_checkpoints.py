"""AIMv2's checkpoints: the config, what decides the architecture, and the published models."""

from __future__ import annotations

from typing import Any

from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig

from nopad.checkpoints.config_json import read_fields
from nopad.checkpoints.formats import Checkpoint, grid_side
from nopad.checkpoints.timm_config import PLAIN_VIT, is_timm, read_model_args
from nopad.text.rules import TextRules

HEAD_DIM = 128
"""Head size of every published model, for files without a config."""


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


# Fields of config.json, by the names of transformers and of Apple's own flat config.
_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout rms_norm_eps qkv_bias mlp_bias initializer_range use_head is_native patch_order projection_dim
positions
"""

_OF_OVIS2 = ("vocab_size", "hidden_stride", "num_visual_indicator_tokens", "tokenize_function")  # behind the tower
_TIMM_ARCHITECTURES = r"aimv2_(large|huge|1b|3b)_patch14_(224|336|448)"
_TIMM_HEADS = {"large": 8, "huge": 12, "1b": 16, "3b": 24}
_KERNEL, _POSITIONS = "embeddings.patch_embed.weight", "embeddings.position_embedding.weight"
_PROJECTION, _GATE = "visual_projection.weight", "ffn.gate_proj"


def read_config(checkpoint: Checkpoint) -> AIMv2PackingConfig:
    """The architecture, from tensor shapes and from `config.json` where there is one.

    Tensors determine whether there is a head, a projection or a position table only where the config does not: Apple's
    flat config read by transformers would give a random head and random positions.

    Raises:
        ValueError: no config and shapes that no published AIMv2 has.
    """
    names = checkpoint.tensors
    hidden_size, channels, patch_size, _ = checkpoint.shape(_KERNEL, 4)
    checkpoint.check_model_type("aimv2", "aimv2_vision_model", "ovis2_vision")
    config_fields = checkpoint.vision_config
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": patch_size,
        "num_hidden_layers": checkpoint.count("encoder.layers."),
        "is_native": _POSITIONS not in names and not is_timm(checkpoint.config),
        "use_head": "head.cls_token" in names,
        "qkv_bias": any(name.endswith("attention.q_proj.bias") for name in names),
        "mlp_bias": any(name.endswith(f"{_GATE}.bias") for name in names),
        "projection_dim": checkpoint.shape(_PROJECTION, 2)[0] if _PROJECTION in names else None,
    }
    if "intermediate_size" not in config_fields:
        fields["intermediate_size"] = checkpoint.shape(f"encoder.layers.0.{_GATE}.weight", 2)[0]
    if _POSITIONS in names and "image_size" not in config_fields:
        num_positions = checkpoint.shape(_POSITIONS, 2)[0]
        fields["image_size"] = grid_side(num_positions, f"checkpoint {checkpoint.name!r}") * patch_size
    fields |= _read_config_json(checkpoint)
    # transformers may leave its defaults out of a config of its own, as SigLIP's do.
    omits_defaults = AIMv2PackingConfig.model_type in (
        config_fields.get("model_type"),
        checkpoint.config.get("model_type"),
    )
    if "num_attention_heads" not in fields and not omits_defaults:
        fields["num_attention_heads"] = checkpoint.num_heads(hidden_size, HEAD_DIM)
    return AIMv2PackingConfig(**fields)


def _read_config_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `config.json`: Apple's, transformers' or timm's."""
    if not is_timm(checkpoint.config):
        return read_fields(
            checkpoint,
            _NAMES.split(),
            aliases={"use_bias": "mlp_bias"},
            fixed={"projection_dropout": 0.0},
            unused=_OF_OVIS2,
        )
    architecture, fields = read_model_args(checkpoint, _TIMM_ARCHITECTURES, fixed=PLAIN_VIT, required=False)
    if architecture:
        fields.setdefault("num_attention_heads", _TIMM_HEADS[architecture.split("_")[1]])
    return fields


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


def _published_text(name: str) -> dict[str, Any]:
    return {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "max_position_embeddings": 77,
    }


# With SDPA, texts of one length get no causal mask in transformers 5.23: `create_causal_mask` leaves it to the kernel,
# which `Aimv2Attention` calls with `is_causal=False`.
TEXT_RULES = TextRules(padding="longest", published=_published_text, has_bos=True, attn_implementation="eager")

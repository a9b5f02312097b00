"""SigLIP2's and SigLIP's checkpoints: the configs, the tensor names, and the published models."""

from __future__ import annotations

import math
from typing import Any

from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

from nopad.checkpoints.formats import Checkpoint, Dialect


class Siglip2PackingConfig(Siglip2VisionConfig):
    """transformers' config of NaFlex checkpoints and what packing adds to it.

    Attributes:
        vision_use_head: whether there is attention pooling.
        patch_order: layout inside a patch.
        positions: `"resample"`, which is what NaFlex does for every image.
    """

    vision_use_head: bool = True  # not declared by transformers 5.17, which reads it
    patch_order: str = "hwc"
    positions: str = "resample"


class SiglipPackingConfig(SiglipVisionConfig):
    """transformers' config of fixed-size checkpoints and what packing adds to it.

    Attributes:
        vision_use_head: whether there is attention pooling.
        patch_order: layout inside a patch.
        positions: on another grid than the trained one, `"resample"` learned positions or refuse: `"strict"`.
    """

    vision_use_head: bool = True  # not declared by transformers 5.17, which reads it
    patch_order: str = "hwc"
    positions: str = "resample"


SiglipConfigs = Siglip2PackingConfig | SiglipPackingConfig


def trained_grid(config: SiglipConfigs) -> tuple[int, int]:
    """`(rows, columns)` of the grid that positions were learned on.

    Raises:
        ValueError: a number of positions that is no square.
    """
    if isinstance(config, SiglipPackingConfig):
        side: int = config.image_size // config.patch_size  # pyright: ignore[reportOperatorIssue]
    else:
        side = _side(config.num_patches, "num_patches")
    return side, side


def _side(number: int, what: str) -> int:
    side = math.isqrt(number)
    if side**2 != number:
        raise ValueError(f"{what}: expected a square number of learned positions, got {number}")
    return side


DIALECTS = (
    Dialect(
        "transformers",
        r"^post_layernorm\.",
        prefixes=("vision_model.",),
        dropped=(r"^text_model\.", r"^logit_scale$", r"^logit_bias$"),
        is_original=True,
    ),
)

_COMMON_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels patch_size hidden_act layer_norm_eps
attention_dropout vision_use_head patch_order positions
"""
_KERNEL, _POSITIONS = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
_LAYERS = "encoder.layers."


def read_config(checkpoint: Checkpoint) -> SiglipConfigs:
    """The architecture: of which kind from the patch embedding, the rest from `config.json`, else from the tensors.

    transformers leaves its defaults out of `config.json`, so that what one of its own does not say is a default.

    Raises:
        ValueError: no config and shapes that no published model has.
    """
    checkpoint.check_model_type("siglip2", "siglip2_vision_model", "siglip", "siglip_vision_model")
    says = checkpoint.vision_config
    ndim = len(checkpoint.shape(_KERNEL))
    if ndim not in (2, 4):
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {_KERNEL!r} is misshapen, expected the matrix of NaFlex or the kernel "
            f"(D, C, p, p) of a fixed size, got {checkpoint.shape(_KERNEL)}"
        )
    config_class = Siglip2PackingConfig if ndim == 2 else SiglipPackingConfig
    names = {*_COMMON_NAMES.split(), "num_patches" if ndim == 2 else "image_size"}
    said = {name: value for name, value in says.items() if name in names}
    own = {config_class.model_type, config_class.model_type.removesuffix("_vision_model")}
    if own.isdisjoint({says.get("model_type"), checkpoint.config.get("model_type")}):
        said = {**_told_by_tensors(checkpoint, said), **said}
    return config_class(**said)


def _told_by_tensors(checkpoint: Checkpoint, said: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` would say."""
    kernel, positions = checkpoint.shape(_KERNEL), checkpoint.shape(_POSITIONS, 2)[0]
    side = _side(positions, f"checkpoint {checkpoint.name!r}")
    fields: dict[str, Any] = {
        "hidden_size": kernel[0],
        "intermediate_size": checkpoint.shape(f"{_LAYERS}0.mlp.fc1.bias", 1)[0],
        "num_hidden_layers": checkpoint.count(_LAYERS),
        "vision_use_head": any(name.startswith("head.") for name in checkpoint.tensors),
    }
    if len(kernel) == 4:
        patch_size = kernel[2]
        # A side that patches do not fill is not in the shapes.
        sizes = {
            model["image_size"]
            for model in PUBLISHED.values()
            if model["patch_size"] == patch_size and model.get("image_size", 0) // patch_size == side
        }
        fields |= {"num_channels": kernel[1], "patch_size": patch_size}
        fields["image_size"] = sizes.pop() if len(sizes) == 1 else side * patch_size
    else:
        fields |= {"num_channels": 3, "patch_size": math.isqrt(kernel[1] // 3), "num_patches": positions}
    if "num_attention_heads" not in said:
        heads = {model["hidden_size"]: model["num_attention_heads"] for model in PUBLISHED.values()}
        if kernel[0] not in heads:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: without config.json the number of heads is known for the published "
                f"widths {sorted(heads)}, but its width is {kernel[0]}; add a config.json with num_attention_heads"
            )
        fields["num_attention_heads"] = heads[kernel[0]]
    return fields


def config_of(fields: dict[str, Any]) -> SiglipConfigs:
    """The config of a published model: NaFlex has no image size."""
    return SiglipPackingConfig(**fields) if "image_size" in fields else Siglip2PackingConfig(**fields)


# Width, heads, layers, feed-forward width.
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 16, 24, 4096),
    "so400m": (1152, 16, 27, 4304),
    "giant-opt": (1536, 16, 40, 6144),
}
_VARIANTS = {
    "siglip2-base-patch16": "224 256 384 512 naflex",
    "siglip2-base-patch32": "256",
    "siglip2-large-patch16": "256 384 512",
    "siglip2-so400m-patch14": "224 384",
    "siglip2-so400m-patch16": "256 384 512 naflex",
    "siglip2-giant-opt-patch16": "256 384",
    "siglip-base-patch16": "224 256 384 512 256-multilingual",
    "siglip-large-patch16": "256 384",
    "siglip-so400m-patch14": "224 384",
    "siglip-so400m-patch16": "256-i18n",
}


def _published() -> dict[str, dict[str, Any]]:
    models = {}
    for model, variants in _VARIANTS.items():
        size, patch_size = model.split("-", 1)[1].split("-patch")
        hidden_size, num_heads, num_layers, intermediate_size = _SIZES[size]
        for variant in variants.split():
            models[f"google/{model}-{variant}"] = {
                "hidden_size": hidden_size,
                "intermediate_size": intermediate_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "num_channels": 3,
                "patch_size": int(patch_size),
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
                "vision_use_head": True,
                **({"num_patches": 256} if variant == "naflex" else {"image_size": int(variant[:3])}),
            }
    return models


PUBLISHED = _published()

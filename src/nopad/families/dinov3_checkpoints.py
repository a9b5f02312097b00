"""DINOv3's checkpoints: the config, the dialects of tensor names, and the published models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig

from nopad.checkpoint import Checkpoint, Dialect, FlattenPatchKernel, StoredTensor, Unstack, only_tensor
from nopad.layers.rope import rope_periods


class DINOv3ViTPackingConfig(DINOv3ViTConfig):
    """transformers' config and what packing adds to it.

    Attributes:
        patch_order: layout inside a patch.
        untie_cls_norm: CLS and register tokens have a final norm of their own, as some of Meta's models do.
        pixel_statistics: of the images that it was trained on, `"imagenet"` (web images) or `"sat493m"` (satellite);
            a checkpoint's own preprocessor config wins.
        rope_periods: the `head size / 4` periods of rope, where they are not the powers of `rope_theta`: Meta's files
            hold them rounded to bfloat16, and Meta's model computes with those.
    """

    patch_order: str = "hwc"
    untie_cls_norm: bool = False
    pixel_statistics: str = "imagenet"
    rope_periods: list[float] | None = None


def biased(config: DINOv3ViTConfig) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values have a bias."""
    return config.query_bias, config.key_bias, config.value_bias


class FuseBiases(ConversionOps):
    """The biases that queries, keys and values have, one after another; the reverse takes them apart."""

    def __init__(self, *, split: bool = False):
        self.split = split

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        if not self.split:
            return Concatenate(dim=0).convert(input_dict, source_patterns, target_patterns)
        names = [name for name, has in zip(target_patterns, biased(kwargs["config"]), strict=True) if has]
        parts = only_tensor(input_dict).chunk(len(names))
        # Whole names: transformers completes a name from the first target, which may have no bias.
        whole = [kwargs["full_layer_name"].replace(target_patterns[0], name) for name in names]
        return {name: part.contiguous() for name, part in zip(whole, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return FuseBiases(split=not self.split)


class TakeBiases(ConversionOps):
    """Of a bias for queries, keys and values the parts that the config has; the reverse puts zeros for the others."""

    def __init__(self, *, fill: bool = False):
        self.fill = fill

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        bias, has = only_tensor(input_dict), biased(kwargs["config"])
        if self.fill:
            bias = fill_biases(bias, has)
        else:
            bias = torch.cat([part for part, kept in zip(bias.chunk(3), has, strict=True) if kept])
        return {target_patterns[0]: bias}

    @property
    def reverse_op(self) -> ConversionOps:
        return TakeBiases(fill=not self.fill)


def fill_biases(bias: Tensor, has: tuple[bool, bool, bool]) -> Tensor:
    """`(D · number of biases)` to `(3 · D)`, zeros where there is no bias."""
    parts = iter(bias.chunk(sum(has)))
    zeros = bias.new_zeros(bias.shape[0] // sum(has))
    return torch.cat([next(parts) if kept else zeros for kept in has])


def _gated_transformers() -> list[WeightConverter | WeightRenaming]:
    parts = [f"attention.{part}_proj" for part in "qkv"]
    return [
        WeightConverter("embeddings.patch_embeddings.weight", "embeddings.proj.weight", [FlattenPatchKernel()]),
        WeightRenaming("embeddings.patch_embeddings.bias", "embeddings.proj.bias"),
        WeightRenaming(r"^layer\.", r"^layers\."),
        WeightConverter([f"{part}.weight" for part in parts], "attention.qkv.weight", [Concatenate(dim=0)]),
        WeightConverter([f"{part}.bias" for part in parts], "attention.qkv.bias", [FuseBiases()]),
        WeightRenaming(r"attention\.o_proj\.", r"attention\.proj\."),
        WeightRenaming(r"layer_scale1\.lambda1", "layer_scale1"),
        WeightRenaming(r"layer_scale2\.lambda1", "layer_scale2"),
        WeightConverter(["mlp.gate_proj", "mlp.up_proj"], "mlp.gate_up", [Concatenate(dim=0)]),
        WeightRenaming(r"mlp\.down_proj\.", r"mlp\.down\."),
    ]


def _transformers() -> list[WeightConverter | WeightRenaming]:
    # Saves gated models too: `gate_up` and `up` tell in this direction what `up_proj` alone does not tell in the other.
    return [*_gated_transformers(), WeightRenaming(r"mlp\.up_proj\.", r"mlp\.up\.")]


def _meta(gated: bool) -> list[WeightConverter | WeightRenaming]:
    if gated:
        mlp = [
            WeightConverter([r"mlp\.w1\.", r"mlp\.w2\."], r"mlp\.gate_up\.", [Concatenate(dim=0)]),
            WeightRenaming(r"mlp\.w3\.", r"mlp\.down\."),
        ]
    else:
        mlp = [
            WeightRenaming(r"mlp\.fc1\.", r"mlp\.up\."),
            WeightRenaming(r"mlp\.fc2\.", r"mlp\.down\."),
        ]
    return [
        WeightRenaming("^cls_token", "^embeddings.cls_token"),
        WeightRenaming("^storage_tokens", "^embeddings.register_tokens"),
        WeightConverter("^mask_token", "^embeddings.mask_token", [Unstack(add=True)]),
        WeightConverter(r"^patch_embed\.proj\.weight", r"^embeddings\.proj\.weight", [FlattenPatchKernel()]),
        WeightRenaming(r"^patch_embed\.proj\.bias", r"^embeddings\.proj\.bias"),
        WeightRenaming(r"^blocks\.", r"^layers\."),
        WeightRenaming(r"attn\.qkv\.weight", r"attention\.qkv\.weight"),
        WeightConverter(r"attn\.qkv\.bias", r"attention\.qkv\.bias", [TakeBiases()]),
        WeightRenaming(r"attn\.proj\.", r"attention\.proj\."),
        WeightRenaming(r"ls1\.gamma", "layer_scale1"),
        WeightRenaming(r"ls2\.gamma", "layer_scale2"),
        *mlp,
    ]


_BIAS_MASK, _PERIODS = r"^blocks\.\d+\.attn\.qkv\.bias_mask$", "rope_embed.periods"


def _mask_biases(checkpoint: Checkpoint) -> Checkpoint:
    """Meta's model multiplies the bias of queries, keys and values with a mask of zeros and ones."""

    def masked(bias: StoredTensor, mask: StoredTensor) -> StoredTensor:
        return replace(bias, read=lambda: bias.read() * mask.read().to(bias.dtype))

    biases = {name: f"{name}_mask" for name in checkpoint.tensors if f"{name}_mask" in checkpoint.left_out}
    products = {name: masked(checkpoint.tensors[name], checkpoint.left_out[mask]) for name, mask in biases.items()}
    return replace(checkpoint, tensors={**checkpoint.tensors, **products})


_META: dict[str, Any] = {
    "signature": r"^(storage_tokens|rope_embed\.periods)$",
    "prepare": _mask_biases,
    # `local_cls_norm` is for the small crops of training alone; the others are read by `read_config`.
    "dropped": (_BIAS_MASK, r"^rope_embed\.periods$", r"^local_cls_norm\."),
}

# In transformers' memory the layers are `model.layer.i`, in its files `layer.i`.
DIALECTS = (
    Dialect(
        "transformers",
        r"^layer\.\d+\.layer_scale1\.lambda1$",
        _transformers,
        prefixes=("model.",),
        is_original=True,
        excludes=(r"^layer\.\d+\.mlp\.gate_proj\.",),
    ),
    Dialect(
        "transformers, gated",
        r"^layer\.\d+\.mlp\.gate_proj\.",
        _gated_transformers,
        prefixes=("model.",),
        is_original=True,
        requires=(r"^layer\.\d+\.layer_scale1\.lambda1$",),
    ),
    Dialect("Meta", conversions=lambda: _meta(gated=False), excludes=(r"^blocks\.\d+\.mlp\.w1\.",), **_META),
    Dialect("Meta, gated", conversions=lambda: _meta(gated=True), excludes=(r"^blocks\.\d+\.mlp\.fc1\.",), **_META),
)

_CONFIG_NAMES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size hidden_act
attention_dropout layer_norm_eps rope_theta query_bias key_bias value_bias proj_bias mlp_bias layerscale_value
drop_path_rate use_gated_mlp num_register_tokens pos_embed_shift pos_embed_jitter pos_embed_rescale initializer_range
patch_order untie_cls_norm pixel_statistics rope_periods
"""


def read_config(checkpoint: Checkpoint, dialect: Dialect) -> DINOv3ViTPackingConfig:
    """The architecture: Meta's from the tensors alone, transformers' from tensors and `config.json`.

    Raises:
        ValueError: a part of the architecture that neither tells, or that no encoder here has.
    """
    meta = dialect.name.startswith("Meta")
    gated = dialect.name.endswith("gated")
    kernel = "patch_embed.proj" if meta else "embeddings.patch_embeddings"
    hidden_size, channels, *sides = checkpoint.shape(f"{kernel}.weight")
    up = f"mlp.{'w2' if gated else 'fc1'}" if meta else "mlp.up_proj"
    blocks = "blocks." if meta else "layer."
    has = {re.sub(rf"^{blocks}\d+\.", "", name) for name in checkpoint.tensors}
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_channels": channels,
        "patch_size": sides,
        "num_hidden_layers": checkpoint.count(blocks),
        "intermediate_size": checkpoint.shape(f"{blocks}0.{up}.weight")[0],
        "num_register_tokens": checkpoint.shape("storage_tokens" if meta else "embeddings.register_tokens")[1],
        "proj_bias": ("attn.proj.bias" if meta else "attention.o_proj.bias") in has,
        "mlp_bias": f"{up}.bias" in has,
        "use_gated_mlp": gated,
        "untie_cls_norm": "cls_norm.weight" in checkpoint.tensors,
    }
    if "sat493m" in Path(checkpoint.name).name:
        fields["pixel_statistics"] = "sat493m"
    if meta:
        fields |= _attention_of_meta(checkpoint, hidden_size)
    else:
        checkpoint.check_model_type("dinov3_vit")
        fields |= {f"{name}_bias": f"attention.{name[0]}_proj.bias" in has for name in ("query", "key", "value")} | {
            name: value for name, value in checkpoint.config.items() if name in _CONFIG_NAMES.split()
        }
        if "num_attention_heads" not in fields:
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: without config.json nothing tells the number of heads; add a "
                f"config.json with num_attention_heads"
            )
    if meta or not checkpoint.config:
        fields["hidden_act"] = "silu" if gated else "gelu"
    fields["patch_size"] = checkpoint.side("patch_size", fields["patch_size"])
    return DINOv3ViTPackingConfig(**fields)


def _attention_of_meta(checkpoint: Checkpoint, hidden_size: int) -> dict[str, Any]:
    """Heads, biases and rope, from the tensors that a Meta checkpoint has for them."""
    if _PERIODS not in checkpoint.left_out:
        raise ValueError(f"checkpoint {checkpoint.name!r}: tensor {_PERIODS!r} is missing, it tells the architecture")
    periods = checkpoint.left_out[_PERIODS].read()
    head_dim = 4 * len(periods)
    if hidden_size % head_dim:
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: {len(periods)} rope periods make heads {head_dim} wide, "
            f"which do not fill a width of {hidden_size}"
        )
    masks = {name: tensor for name, tensor in checkpoint.left_out.items() if name.endswith("bias_mask")}
    biases = {f"{name}_mask" for name in checkpoint.tensors if name.endswith("attn.qkv.bias")}
    if masks and biases != masks.keys():
        raise ValueError(
            f"checkpoint {checkpoint.name!r}: expected an attn.qkv.bias_mask for each attn.qkv.bias or for none, "
            f"got only one of the two for {sorted(biases ^ masks.keys())[:10]}"
        )
    key_bias = bool(biases) and not masks
    for name, mask in masks.items():
        values = mask.read().float()
        if values.shape != (3 * hidden_size,) or not ((values == 0) | (values == 1)).all():
            raise ValueError(
                f"checkpoint {checkpoint.name!r}: {name}: expected {3 * hidden_size} zeros and ones, got "
                f"{tuple(values.shape)} of {values.unique()[:10].tolist()}"
            )
        key_bias = key_bias or bool(values.chunk(3)[1].any())
    return {
        "num_attention_heads": hidden_size // head_dim,
        "query_bias": bool(biases),
        "key_bias": key_bias,
        "value_bias": bool(biases),
        **_rope(checkpoint.name, periods.float()),
    }


def _rope(name: str, periods: Tensor) -> dict[str, Any]:
    """The base of which `periods` are the powers; the periods themselves, too, where rounding has moved them."""
    if not (periods.isfinite() & (periods > 0)).all():
        raise ValueError(f"checkpoint {name!r}: {_PERIODS}: expected finite numbers above 0, got {periods.tolist()}")
    number = len(periods)
    told = float(periods[-1]) ** (number / (number - 1)) if number > 1 else 100.0

    def near(tolerance: float) -> list[float]:
        powers = {base: rope_periods(4 * number, base, "cpu") for base in (100.0, round(told, 3), told) if base > 0}
        return [base for base, each in powers.items() if torch.allclose(each, periods, rtol=tolerance, atol=0)]

    for base in near(1e-6):
        return {"rope_theta": base}
    return {"rope_theta": [*near(2**-8), told][0], "rope_periods": periods.tolist()}


def _published() -> dict[str, dict[str, Any]]:
    sizes = {  # hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, gated
        "vits16": (384, 12, 6, 1536, False),
        "vits16plus": (384, 12, 6, 1536, True),
        "vitb16": (768, 12, 12, 3072, False),
        "vitl16": (1024, 24, 16, 4096, False),
        "vith16plus": (1280, 32, 20, 5120, True),
        "vit7b16": (4096, 40, 32, 8192, True),
    }
    trained = [(size, "lvd1689m") for size in sizes] + [("vitl16", "sat493m"), ("vit7b16", "sat493m")]
    models = {}
    for size, images in trained:
        hidden_size, num_layers, num_heads, intermediate_size, gated = sizes[size]
        models[f"facebook/dinov3-{size}-pretrain-{images}"] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "intermediate_size": intermediate_size,
            "use_gated_mlp": gated,
            "hidden_act": "silu" if gated else "gelu",
            "query_bias": size != "vit7b16",
            "key_bias": False,
            "value_bias": size != "vit7b16",
            "num_register_tokens": 4,
            "patch_size": 16,
            "num_channels": 3,
            "layer_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "pixel_statistics": "sat493m" if images == "sat493m" else "imagenet",
        }
    return models


PUBLISHED = _published()

"""State dicts of nopad 0.1, whose encoders kept fused matrices under names of their own, as those of today."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from nopad.layers.patch_embed import reorder_patches
from nopad.layers.roles import registered_path

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

_FUSED = re.compile(r"^layers\.\d+\.(attention\.qkv|mlp\.gate_up)\.weight$")
_PARTS = {
    "attention.qkv": ("attention.q", "attention.k", "attention.v"),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
    "head.kv": ("head.k", "head.v"),
}


def has_fused_names(names: Iterable[str]) -> bool:
    """Whether a state dict was saved from an encoder of nopad 0.1."""
    return any(_FUSED.match(name) for name in names)


def from_fused_names(encoder: PackedEncoder, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of nopad 0.1 under the names that this encoder loads.

    Args:
        encoder: of the same architecture and `patch_order` as the one that was saved.
        state_dict: as `encoder.state_dict()` of nopad 0.1 gave it.

    Raises:
        ValueError: a tensor that no encoder of nopad 0.1 of this architecture had.
    """
    if not has_fused_names(state_dict):
        raise ValueError(f"state_dict: expected the fused names of nopad 0.1, got {sorted(state_dict)[:5]}")
    converted = {}
    for name, tensor in state_dict.items():
        try:
            for role, value in _split(encoder, name, tensor).items():
                converted[registered_path(encoder, role)] = value
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"state_dict: {name!r} is no tensor of nopad 0.1's {encoder.family} encoder") from error
    needed = {name: value.shape for name, value in encoder.state_dict().items()}
    problems = sorted(n for n in needed.keys() | converted if needed.get(n) != getattr(converted.get(n), "shape", None))
    if problems:
        raise ValueError(f"state_dict: missing, unexpected or misshapen once converted: {problems[:10]}")
    return converted


def _split(encoder: PackedEncoder, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that one of nopad 0.1 has become, by role."""
    module, _, leaf = name.rpartition(".")
    for fused, parts in _PARTS.items():
        if module.endswith(fused):
            stem = module.removesuffix(fused)
            having = [
                f"{stem}{part}" for part in parts if getattr(encoder.get_submodule(f"{stem}{part}"), leaf) is not None
            ]
            return {f"{part}.{leaf}": rows for part, rows in zip(having, tensor.chunk(len(having)), strict=True)}
    if leaf in ("layer_scale1", "layer_scale2"):
        return {f"{name}.lambda1": tensor}
    if name == "embeddings.position_embedding":
        return {f"{name}.weight": tensor}
    if name == "embeddings.proj.weight":
        return {name: _kernel(tensor, encoder)}
    if module == "embeddings.norm" and encoder.family == "onevision":
        return {f"layernorm_pre.{leaf}": tensor}
    if module == "head.qkv":
        return {f"head.attention.in_proj_{leaf}": tensor}
    if module == "head.proj" and encoder.family != "aimv2":
        return {f"head.attention.out_proj.{leaf}": tensor}
    return {name: tensor}


def _kernel(matrix: Tensor, encoder: PackedEncoder) -> Tensor:
    """`(D, P)` over patches in the encoder's order as the weight of its patch embedding."""
    config, shape = encoder.config, encoder.embeddings.proj.weight.shape
    order = "chw" if len(shape) == 4 else "hwc"  # a convolution's, or that of NaFlex's linear map
    return reorder_patches(matrix, config.patch_size, config.patch_order, order).reshape(shape).contiguous()

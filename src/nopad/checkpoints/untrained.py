"""Random weights: published architectures with seeded ones, and fresh ones for training."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import initialization as init

from nopad.checkpoints.head_removal import remove_head_from_config
from nopad.checkpoints.strict import check_dtype, with_options
from nopad.layers.block import LayerScale
from nopad.layers.patch_embed import PatchEmbedding
from nopad.layers.pooling import MAPAttention
from nopad.layers.position_table import PositionTable
from nopad.patches import PatchOrder
from nopad.published import UNTRAINED

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder


def untrained(
    cls: type[PackedEncoder],
    name: str,
    *,
    attention: str | None = None,
    patch_order: PatchOrder | None = None,
    positions: str | None = None,
    dtype: torch.dtype | str | None = None,
    head: bool = True,
    seed: int = 0,
) -> Any:
    """A published architecture with seeded random weights, the same on every machine.

    Raises:
        ValueError: not a published name of this family.
    """
    config = with_options(cls.published_config(name), patch_order=patch_order, positions=positions)
    config = config if head else remove_head_from_config(cls, config)
    with torch.device("meta"):
        model: Any = cls(config)
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype, dtype)
    check_dtype(dtype or torch.float32)
    model = model.to(dtype=dtype or torch.float32).to_empty(device="cpu")
    fill(model, seed)
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)
    model.source = model.name_or_path = model.config.name_or_path = UNTRAINED + name
    model.set_attention(attention or "auto")
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Give every parameter random values that depend on its name and the seed alone.

    Matrices are N(0, 1 / inputs), so that activations keep their size; norms and layer scales are near one, so that a
    mistaken norm shows; all else is small.

    Args:
        model: filled in place, on the CPU.
        seed: any integer.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        noise = torch.empty(parameter.shape, dtype=torch.float32).normal_(generator=generator)
        if parameter.ndim >= 2 and name.endswith("weight") and "pos_embed" not in name and "position" not in name:
            noise *= parameter[0].numel() ** -0.5
        elif parameter.ndim == 1 and not name.endswith("bias"):
            noise.mul_(0.1).add_(1.0)
        else:
            noise *= 0.1
        parameter.copy_(noise)


def init_weights(encoder: PackedEncoder, module: nn.Module) -> None:
    """Fresh values for a shared layer, and for the parameters that embeddings and head have themselves.

    They are drawn as transformers' models draw theirs, which leave those alone that are loaded already.

    Args:
        encoder: whose config has `initializer_range`, else 0.02, and with layer scales `layerscale_value`.
        module: one of its modules.
    """
    std = getattr(encoder.config, "initializer_range", 0.02)
    if isinstance(module, PatchEmbedding):
        init.normal_(module.weight, std=std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, PositionTable):
        init.normal_(module.weight, std=std)
    elif isinstance(module, LayerScale):
        init.constant_(module.lambda1, encoder.config.layerscale_value)
    elif isinstance(module, MAPAttention):
        init.normal_(module.in_proj_weight, std=std)
        init.zeros_(module.in_proj_bias)
    elif module in (encoder.embeddings, encoder.head):
        for name, parameter in module.named_parameters(recurse=False):
            if name == "mask_token":  # for masked training alone
                init.zeros_(parameter)
            else:  # CLS and register tokens, probes
                init.normal_(parameter, std=std)

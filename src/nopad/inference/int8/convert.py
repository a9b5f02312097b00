"""Conversion of an encoder's transformer blocks to int8.

Patch embedding, norms, attention, activations, residual sums and pooling keep their dtype.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from nopad.inference.int8.format import int_mm_is_exact
from nopad.inference.int8.modules import Int8Linear
from nopad.inference.quantized import check_hooks
from nopad.layers.linear import joined
from nopad.layers.mlp import GatedMLP

logger = logging.getLogger(__name__)


def to_int8(layers: nn.ModuleList) -> None:
    """Convert the linear layers of all blocks to int8, or none where one of them cannot be converted.

    Queries, keys and values become one layer. Weights of norms stay where they are: they make the channels alike that
    a trained model has grown large, which one scale per row needs.

    Raises:
        ValueError: see `check_block`.
    """
    if not int_mm_is_exact():
        logger.warning(
            "int8 is slower than float32 on this processor, which has no fast and exact GEMM of int8 (VNNI or AMX)"
        )
    blocks: Any = list(layers)
    for index, block in enumerate(blocks):
        check_block(block, index)
    for block in blocks:
        attention, mlp = block.attention, block.mlp
        attention.qkv = Int8Linear(joined(attention.qkv_linears))
        attention.q = attention.k = attention.v = None
        attention.stack_weights()  # lets go of their joint weight
        attention.proj = Int8Linear(attention.proj)
        for name in mlp_linears(mlp):
            setattr(mlp, name, Int8Linear(getattr(mlp, name)))
        if isinstance(mlp, GatedMLP):
            mlp.stack_weights()


def mlp_linears(mlp: nn.Module) -> tuple[str, ...]:
    """The roles of the linear layers."""
    return ("gate", "up", "down") if isinstance(mlp, GatedMLP) else ("up", "down")


def check_block(block: Any, index: int) -> None:
    """Check that a block can be converted, before anything is.

    Raises:
        ValueError: adapters, layers quantised already, or hooks on modules that the conversion replaces.
    """
    attention, mlp = block.attention, block.mlp
    linears = (*attention.qkv_linears, attention.proj, *(getattr(mlp, name) for name in mlp_linears(mlp)))
    for linear in linears:
        Int8Linear.check_linear(linear)
    check_hooks(block, index, set(linears), Int8Linear.precision)

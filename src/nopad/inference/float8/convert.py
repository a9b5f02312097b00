"""Conversion of an encoder's transformer blocks to float8.

Patch embedding, attention and pooling keep their dtype, and so do the linear layers that `to_float8` excludes.
`absorb_norms` may fold the weights of norms into the linear layers after them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from nopad.inference.float8.modules import (
    Float8GatedMLP,
    Float8Linear,
    Float8QKV,
)
from nopad.inference.quantized import check_hooks, check_plain_linear
from nopad.kernels.gemm_formats import FP8_MAX
from nopad.layers.linear import joined
from nopad.layers.mlp import GatedMLP


def to_float8(layers: nn.ModuleList) -> None:
    """Convert the linear layers of all blocks to float8, or none where one of them cannot be converted.

    Layers with the same input become one: queries, keys and values; gate and up. The output projection of the attention
    keeps its dtype: rounding its input, which no GEMM could fuse, would cost what the faster GEMM saves. So do values
    in the first half of the blocks: their error passes through all later blocks, and in images of a few patches no sum
    over keys averages it out.

    Raises:
        ValueError: see `check_block`.
    """
    blocks: Any = list(layers)
    for index, block in enumerate(blocks):
        check_block(block, index)
    for index, block in enumerate(blocks):
        attention, mlp, dtype = block.attention, block.mlp, block.attention.proj.weight.dtype
        qkv = joined(attention.qkv_linears)
        gated = isinstance(mlp, GatedMLP) and isinstance(mlp.activation, nn.SiLU | SiLUActivation)
        up = joined((mlp.gate, mlp.up)) if gated else mlp.up
        rms_norms = isinstance(block.norm1, nn.RMSNorm) and isinstance(block.norm2, nn.RMSNorm)
        if gated and rms_norms and qkv.bias is None and up.bias is None:
            absorb_norms(block, qkv, up)
        if gated:
            block.mlp = Float8GatedMLP(up, mlp.activation, mlp.down)
        else:
            for name in ("gate", "up", "down") if isinstance(mlp, GatedMLP) else ("up", "down"):
                setattr(mlp, name, Float8Linear(getattr(mlp, name)))
        if index < len(blocks) / 2:
            attention.qkv = Float8QKV(qkv)
            attention.qkv.value.to(dtype)  # `absorb_norms` leaves float32
        else:
            attention.qkv = Float8Linear(qkv)
        attention.q = attention.k = attention.v = None
        attention.stack_weights()  # lets go of their joint weight


def check_block(block: Any, index: int) -> None:
    """Check that a block can be converted, before anything is.

    Raises:
        ValueError: see `Float8Linear.check_linear`; hooks on modules that the conversion replaces.
    """
    attention, mlp = block.attention, block.mlp
    up = (mlp.gate, mlp.up) if isinstance(mlp, GatedMLP) else (mlp.up,)
    for linear in (*attention.qkv_linears, *up, mlp.down):
        Float8Linear.check_linear(linear)
    check_plain_linear(attention.proj, Float8Linear.precision)
    replaced = {block.norm1, block.norm2, *attention.qkv_linears, *mlp.modules()}
    check_hooks(block, index, replaced, Float8Linear.precision)


@torch.no_grad()
def absorb_norms(block: Any, qkv: nn.Linear, gate_up: nn.Linear) -> None:
    """Move factors of a block to where they are rounded once; the block's function stays the same.

    The weights of the norms go into the linear layers after them. `up` is divided, and the columns of `down` are
    multiplied, by powers of two that keep `silu(gate) · up` below `FP8_MAX` for any input: a normed row has the length
    `sqrt(D)`, and on a sphere of that radius the product of two linear forms a and b is at most
    `D · (|a| |b| + |a · b|) / 2`. It can therefore be rounded to float8 before its largest value is known.

    Args:
        block: its norms lose their weights, and its `mlp.down` gets another weight.
        qkv, gate_up: the block's joined layers; they get other weights, in float32.
    """
    for name, linear in (("norm1", qkv), ("norm2", gate_up)):
        norm = getattr(block, name)
        linear.weight = nn.Parameter(linear.weight.float() * norm.weight.float(), requires_grad=False)
        setattr(block, name, nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))
    gate, up = gate_up.weight.chunk(2)
    bound = gate.shape[1] * (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(dim=1).abs()) / 2
    # The bound is zero where gate or up is zero: then any factor that does not overflow will do.
    factor = (bound / FP8_MAX).clamp(2.0**-60, 2.0**60).log2().ceil().exp2()
    gate_up.weight = nn.Parameter(torch.cat((gate, up / factor[:, None])), requires_grad=False)
    block.mlp.down.weight = nn.Parameter(block.mlp.down.weight.float() * factor, requires_grad=False)

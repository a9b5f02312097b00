"""A block of layers in int8 for `BlockedLayers`: four GEMMs of integers whose results the next pass scales by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nopad.inference.fusion.blocked_qkv import split_heads, store_qkv
from nopad.inference.int8.format import is_exact, multiply_integers, quantize_rows
from nopad.inference.int8.modules import Int8Linear
from nopad.layers.attention import PackedAttention, Rope
from nopad.layers.block import Block, LayerScale
from nopad.layers.mlp import MLP, GatedMLP


def can_pack_int8(block: nn.Module) -> bool:
    """Whether `Int8Block` can represent a block: layers in int8, known modules, no overridden forward."""
    if type(block) is not Block or type(block.attention) is not PackedAttention:
        return False
    if any("forward" in vars(module) for module in block.modules()):
        return False
    attention, mlp = block.attention, block.mlp
    if type(mlp) not in (MLP, GatedMLP) or attention.q is not None:
        return False
    linears = (attention.qkv, attention.proj, *(getattr(mlp, name) for name in _roles(mlp)))
    norms = block.norm1, block.norm2
    scales = block.layer_scale1, block.layer_scale2
    return (
        all(type(linear) is Int8Linear for linear in linears)
        and all(type(norm) in (nn.RMSNorm, nn.LayerNorm) for norm in norms)
        and all(scale is None or type(scale) is LayerScale for scale in scales)
    )


def _roles(mlp: nn.Module) -> tuple[str, ...]:
    return ("gate", "up", "down") if isinstance(mlp, GatedMLP) else ("up", "down")


class Int8Weight:
    """A weight in the layout of the CPU's GEMM of integers; a layer scale behind it is part of its scales.

    Args:
        linear: copied.
        num_rows: rows of a block.
        layer_scale: the factor of each output, or `None`.
    """

    def __init__(self, linear: Any, num_rows: int, layer_scale: LayerScale | None = None) -> None:
        self.scale, bias = linear.scale.flatten(), linear.bias
        dtype = torch.float32 if bias is None else bias.dtype
        if layer_scale is not None:
            factor = layer_scale.lambda1.detach().float()
            self.scale, bias = self.scale * factor, None if bias is None else (bias.float() * factor).to(dtype)
        self.bias: Tensor | None = bias
        self.weight: Tensor = linear.weight
        self.operand = onednn_operand()
        if self.operand is not None:
            self.weight = torch.ops.onednn.qlinear_prepack(linear.weight, [num_rows, linear.in_features])

    def __call__(self, quantized: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded rows `(R, K)` to `(R, N)` in `dtype`, without the rows' scales and the bias."""
        if self.operand is None:
            return (multiply_integers(quantized, self.weight) * self.scale).to(dtype)
        return _gemm(self.operand, quantized, self.weight, self.scale, dtype)

    def scaled(self, output: Tensor, scale: Tensor) -> Tensor:
        """What `__call__` returned, with the scales of its rows and the bias; overwritten."""
        return output.mul_(scale) if self.bias is None else torch.addcmul(self.bias, output, scale)

    def added(self, output: Tensor, scale: Tensor, other: Tensor) -> Tensor:
        """`scaled(output, scale) + other`."""
        total = torch.addcmul(other, output, scale)
        return total if self.bias is None else total.add_(self.bias)


@dataclass(frozen=True)
class Operand:
    """The integers that oneDNN's GEMM takes for activations."""

    zero_point: int

    def __call__(self, quantized: Tensor) -> Tensor:
        """int8 to the same numbers, plus the zero point."""
        return quantized.view(torch.uint8).bitwise_xor(128) if self.zero_point else quantized


SIGNED, UNSIGNED = Operand(0), Operand(128)


@lru_cache
def onednn_operand() -> Operand | None:
    """What oneDNN's GEMM takes on this processor, `None` where it is not exact or not built.

    AMX multiplies signed activations by signed weights, VNNI alone unsigned ones. For signed ones and prepacked weights
    oneDNN has reference loops there, which take a thousand times as long.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    cpu: Any = torch.cpu
    operand = SIGNED if cpu._is_amx_tile_supported() else UNSIGNED

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        weight = torch.ops.onednn.qlinear_prepack(b.T.contiguous(), list(a.shape))
        return _gemm(operand, a, weight, torch.ones(b.shape[1]), torch.float32)

    return operand if is_exact(multiply) else None


def _gemm(operand: Operand, a: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """oneDNN's GEMM with a scale for each output."""
    activations = operand(a), 1.0, operand.zero_point
    zero_points = torch.zeros(len(scale), dtype=torch.int32)
    run: Any = torch.ops.onednn.qlinear_pointwise
    return run(*activations, weight, scale, zero_points, None, 1.0, 0, dtype, "none", [], "")


@dataclass(frozen=True)
class Int8Block:
    """A block in int8, its weights in the layout of the CPU's GEMMs; see `PackedBlock`, whose methods it has.

    Attributes:
        qkv, proj, gate, up, down: the weights; `gate` is `None` where the block has none.
        norm1, norm2: the norms.
        activation: activation of the gate, or of `up`.
        num_heads: H.
        execution: name of this way to run layers, for reports.
    """

    qkv: Int8Weight
    proj: Int8Weight
    gate: Int8Weight | None
    up: Int8Weight
    down: Int8Weight
    norm1: nn.Module
    norm2: nn.Module
    activation: Callable[[Tensor], Tensor]
    num_heads: int
    execution: str

    @classmethod
    def of(cls, layer: Block, num_rows: int) -> Int8Block:
        """Pack a layer that `can_pack_int8` accepts, for blocks of so many rows."""
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(mlp, MLP | GatedMLP)
        up = Int8Weight(mlp.up, num_rows)
        return cls(
            qkv=Int8Weight(attention.qkv, num_rows),
            proj=Int8Weight(attention.proj, num_rows, layer.layer_scale1),
            gate=Int8Weight(mlp.gate, num_rows) if isinstance(mlp, GatedMLP) else None,
            up=up,
            down=Int8Weight(mlp.down, num_rows, layer.layer_scale2),
            norm1=layer.norm1,
            norm2=layer.norm2,
            activation=mlp.activation,
            num_heads=attention.num_heads,
            execution=f"int8 by {'torch' if up.operand is None else 'onednn'}",
        )

    def qkv_into(self, out: Tensor, tokens: Tensor, rope: Rope | None) -> None:
        """Queries, keys and values of the normed tokens: `(R, D)` to `(R, 3, H, K)`, written to `out`."""
        quantized, scale = quantize_rows(self.norm1(tokens))
        qkv = self.qkv(quantized, tokens.dtype)
        if rope is None and self.qkv.bias is None:
            torch.mul(split_heads(qkv, out), scale[..., None, None], out=out)
        else:
            store_qkv(out, self.qkv.scaled(qkv, scale), rope)

    def after_attention(self, attended: Tensor, tokens: Tensor) -> Tensor:
        """The rest of the block: `(R, D)` to `(R, D)`."""
        quantized, scale = quantize_rows(attended)
        tokens = self.proj.added(self.proj(quantized, tokens.dtype), scale, tokens)
        quantized, scale = quantize_rows(self.norm2(tokens))
        hidden = self.up.scaled(self.up(quantized, tokens.dtype), scale)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden.mul_(self.activation(self.gate.scaled(self.gate(quantized, tokens.dtype), scale)))
        quantized, scale = quantize_rows(hidden)
        return self.down.added(self.down(quantized, tokens.dtype), scale, tokens)

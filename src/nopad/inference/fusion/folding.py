"""Transformer blocks with their norms, layer scales and biases folded into four matrices, for inference.

- The weight of a norm goes into the matrix after it: `W · diag(weight)`; the bias of a norm becomes one of that matrix.
- A layer scale goes into the matrix before it.
- A LayerNorm takes the mean of a row away before anything else. Where all that is ever added to a row has a mean of
  zero, there is none to take away, and what is left is an RMSNorm: the matrices that add to the residual stream are
  centred by column (Ashkboos et al., arXiv:2401.15024, section 3.2).

What is then left of a norm is one number for each row, `1 / rms`, which a product can apply to its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from nopad.inference.float8 import FLOAT8, Float8GatedMLP, Float8Linear, Float8QKV, takes_apart
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block, LayerScale
from nopad.layers.linear import joined
from nopad.layers.mlp import MLP, GatedMLP


@dataclass(frozen=True)
class Matrix:
    """A linear map.

    Attributes:
        weight: `(N, K)`.
        bias: `(N,)` float32, or `None`.
        scale: `(N,)` float32 where the weight is float8: what its rows are to be multiplied with; else `None`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Matrix:
        """Its rows in another order."""
        weight = self.weight.view(torch.uint8) if self.weight.dtype == FLOAT8 else self.weight
        bias, scale = (None if part is None else part[rows] for part in (self.bias, self.scale))
        return Matrix(weight[rows].view(self.weight.dtype), bias, scale)

    def like(self, other: Matrix) -> bool:
        """Whether another one has the same parts."""
        return [part is None for part in self.parts] == [part is None for part in other.parts]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and scale."""
        return self.weight, self.bias, self.scale

    def copy_(self, other: Matrix) -> None:
        """Take the values of another one that is `like` this."""
        for own, new in zip(self.parts, other.parts, strict=True):
            if own is not None and new is not None:
                own.copy_(new)


@dataclass(frozen=True)
class FoldedBlock:
    """A block whose norms have become one number for each row.

    Attributes:
        qkv: `(3 · D, D)`, rows by head: query, key and value of the first, of the second, …; `(2 · D, D)` without
            values.
        proj: `(D, D)`.
        up: `(I, D)`, or `(2 · I, D)` with rows of gate and up in turn.
        down: `(D, I)`.
        activation: `"silu"`, `"gelu"` or `"gelu_tanh"`.
        gated: whether `up` holds gates.
        eps: of both norms.
        num_heads: H.
        centred: whether rows have a mean of zero.
        value: `(D, D)` where values have a matrix of their own, else `None`.
    """

    qkv: Matrix
    proj: Matrix
    up: Matrix
    down: Matrix
    activation: str
    gated: bool
    eps: float
    num_heads: int
    centred: bool
    value: Matrix | None = None

    @classmethod
    def of(cls, block: Block, channels: Tensor | None = None) -> FoldedBlock:
        """Fold a block that `can_fold` accepts; its own weights stay as they are.

        Args:
            block: in the dtype that the products take.
            channels: `(K,)` order of the channels of queries and keys, theirs unless given.
        """
        attention, mlp = block.attention, block.mlp
        assert isinstance(mlp, MLP | GatedMLP | Float8GatedMLP)
        gated, norm = not isinstance(mlp, MLP), block.norm1
        up = folded(_up_of(mlp), block.norm2)
        centred = isinstance(norm, nn.LayerNorm)
        activation = name_of(mlp.activation)
        assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
        assert norm.eps is not None
        assert activation is not None
        qkv: Any = attention.qkv or joined((attention.q, attention.k, attention.v))
        value, parts = None, 3
        if isinstance(qkv, Float8QKV):
            qkv, value, parts = qkv.query_key, folded(qkv.value, norm), 2
        return cls(
            qkv=folded(qkv, norm)[by_head(attention.num_heads, attention.head_dim, channels, parts)],
            proj=scaled(attention.proj, block.layer_scale1, centred),
            up=up[in_turn(len(up.weight) // 2)] if gated else up,
            down=scaled(mlp.down, block.layer_scale2, centred),
            activation=activation,
            gated=gated,
            eps=norm.eps,
            num_heads=attention.num_heads,
            centred=centred,
            value=value,
        )

    def with_pairs(self, places: Sequence[int]) -> FoldedBlock:
        """The same with gates and their ups in another order.

        Args:
            places: which of `len(places)` pairs, of which I is a multiple, comes first, second, …
        """
        rows = torch.arange(len(self.up.weight)).view(-1, len(places), 2)
        return dataclasses.replace(self, up=self.up[rows[:, list(places)].flatten()])

    @property
    def small(self) -> bool:
        """Whether rows of the residual stream and what goes down are float8."""
        return self.down.scale is not None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All four, and that of the values where they have one."""
        value = () if self.value is None else (self.value,)
        return self.qkv, self.proj, self.up, self.down, *value


def can_fold(block: nn.Module) -> bool:
    """Whether a block is of the kind that `FoldedBlock` stands for, with nobody's own forward in it."""
    if type(block) is not Block or type(block.attention) is not PackedAttention:
        return False
    if any("forward" in vars(module) for module in block.modules()):
        return False
    parts: Any = block
    first, second, attention, mlp = parts.norm1, parts.norm2, parts.attention, parts.mlp
    if type(first) not in (nn.RMSNorm, nn.LayerNorm) or type(second) is not type(first):
        return False
    if first.eps is None or first.eps != second.eps:
        return False
    unscaled = parts.layer_scale1 is None and parts.layer_scale2 is None
    if isinstance(mlp, Float8GatedMLP):  # which `float8.prepare` has absorbed the norms of, or has not
        absorbed = isinstance(first, nn.RMSNorm) and first.weight is None and second.weight is None
        apart, qkv = isinstance(attention.qkv, Float8QKV), attention.qkv
        small = (mlp.gate_up, mlp.down, qkv.query_key if apart else qkv)
        plain = (attention.proj, qkv.value) if apart else (attention.proj,)
        known = all(isinstance(linear, Float8Linear) for linear in small) and all(map(takes_apart, plain))
        return absorbed and unscaled and known and all(linear.bias is None for linear in small + plain)
    if type(mlp) not in (MLP, GatedMLP) or first.weight is None or second.weight is None or attention.qkv is not None:
        return False
    known = name_of(mlp.activation) in (("silu",) if isinstance(mlp, GatedMLP) else ("silu", "gelu", "gelu_tanh"))
    scaled_both = type(parts.layer_scale1) is type(parts.layer_scale2) is LayerScale
    up = (mlp.gate, mlp.up) if isinstance(mlp, GatedMLP) else (mlp.up,)
    maps = (attention.q, attention.k, attention.v, attention.proj, *up, mlp.down)
    return known and (unscaled or scaled_both) and all(takes_apart(linear) for linear in maps)


def _up_of(mlp: MLP | GatedMLP | Float8GatedMLP) -> Any:
    """The map that a feed-forward layer begins with."""
    if isinstance(mlp, GatedMLP):
        return joined((mlp.gate, mlp.up))
    return mlp.up if isinstance(mlp, MLP) else mlp.gate_up


def name_of(activation: Any) -> str | None:
    """`"silu"`, `"gelu"`, `"gelu_tanh"`, or `None` for another."""
    if isinstance(activation, nn.SiLU | SiLUActivation):
        return "silu"
    if isinstance(activation, GELUActivation):
        return "gelu"
    return "gelu_tanh" if isinstance(activation, GELUTanh) else None


def parts_of(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32."""
    return linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float()


def folded(linear: nn.Linear | Float8Linear, norm: nn.Module) -> Matrix:
    """A matrix that takes rows before the weight and bias of their norm, rounded once."""
    if isinstance(linear, Float8Linear):  # which its norm has been folded into
        return Matrix(linear.weight, linear.bias, linear.scale[:, 0])
    weight, bias = parts_of(linear)
    if isinstance(norm, nn.LayerNorm):
        if norm.bias is not None:
            shift = weight @ norm.bias.detach().float()
            bias = shift if bias is None else bias + shift
        weight = weight * norm.weight.detach().float()
        weight = weight - weight.mean(dim=1, keepdim=True)  # of a row's mean, as far as rounding has left any
    elif isinstance(norm, nn.RMSNorm) and norm.weight is not None:
        weight = weight * norm.weight.detach().float()
    return Matrix(weight.to(linear.weight.dtype), bias)


def scaled(linear: nn.Linear | Float8Linear, layer_scale: LayerScale | None, centred: bool) -> Matrix:
    """A matrix that adds to the residual stream: its layer scale and its centring in it, rounded once."""
    if isinstance(linear, Float8Linear):
        return Matrix(linear.weight, linear.bias, linear.scale[:, 0])
    weight, bias = parts_of(linear)
    if layer_scale is None and not centred:
        return Matrix(linear.weight.detach(), bias)  # the weight itself, no copy
    if layer_scale is not None:
        factor = layer_scale.lambda1.detach().float()
        weight, bias = weight * factor[:, None], None if bias is None else bias * factor
    if centred:
        weight = weight - weight.mean(dim=0)
        bias = None if bias is None else bias - bias.mean()
    return Matrix(weight.to(linear.weight.dtype), bias)


def by_head(num_heads: int, head_dim: int, channels: Tensor | None, parts: int = 3) -> Tensor:
    """Order in which rows of queries, keys and values become rows of heads; two `parts` are without values."""
    rows = torch.arange(parts * num_heads * head_dim).view(parts, num_heads, head_dim)
    if channels is not None:
        rows = torch.cat((rows[:2, :, channels], rows[2:]))
    return rows.transpose(0, 1).flatten()


def in_turn(size: int) -> Tensor:
    """Order in which `size` rows of gate and as many of up alternate."""
    return torch.arange(2 * size).view(2, size).T.flatten()

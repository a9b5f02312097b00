"""Transformer blocks with norms, layer scales and biases folded into four weights, for inference.

- The weight of a norm goes into the linear layer after it, `W · diag(weight)`; its bias becomes a bias of that layer.
- A layer scale goes into the linear layer before it.
- Quick GELU, `x · sigmoid(1.702 x)`, is `silu(1.702 x) / 1.702`: the factor goes into the linear layer before it, its
  inverse into the one after it.
- LayerNorm subtracts the mean of each row. If every term of the residual sum has zero mean, so do all rows, and
  LayerNorm becomes RMSNorm: the weights that add to the residual stream are centred along their outputs (Ashkboos et
  al., arXiv:2401.15024, section 3.2). Where no LayerNorm follows the layers, rows keep theirs, and norms subtract it.

What remains of a norm is one factor per row, `1 / rms`, which a GEMM can apply in its epilogue.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, QuickGELUActivation, SiLUActivation

from nopad.inference.float8.modules import Float8GatedMLP, Float8Linear, Float8QKV
from nopad.kernels.gemm_formats import FP8, HALF_ALIGNMENT
from nopad.layers.attention import PackedAttention
from nopad.layers.block import Block, LayerScale
from nopad.layers.linear import is_plain_linear, joined
from nopad.layers.mlp import MLP, GatedMLP

QUICK_GELU = 1.702
"""Factor in `QuickGELUActivation`."""


@dataclass(frozen=True)
class GemmWeight:
    """The weight of a GEMM.

    Attributes:
        weight: `(N, K)`.
        bias: `(N,)` float32, or `None`.
        scale: `(N,)` float32 factor of each row where the weight is float8, else `None`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> GemmWeight:
        """The rows with these indices, in this order."""
        weight = self.weight.view(torch.uint8) if self.weight.dtype == FP8 else self.weight
        bias, scale = (None if tensor is None else tensor[rows] for tensor in (self.bias, self.scale))
        return GemmWeight(weight[rows].view(self.weight.dtype), bias, scale)

    def same_tensors(self, other: GemmWeight) -> bool:
        """Whether both have a bias, and both a scale, or both have none."""
        return [tensor is None for tensor in self.tensors] == [tensor is None for tensor in other.tensors]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, bias and scale."""
        return self.weight, self.bias, self.scale

    @property
    def address(self) -> int:
        """Address of the weight in memory: that of a layer's parameter where nothing had to be folded into it."""
        return self.weight.data_ptr()

    def copy_(self, other: GemmWeight) -> None:
        """Copy the values of another weight with the `same_tensors`."""
        for target, source in zip(self.tensors, other.tensors, strict=True):
            if target is not None and source is not None:
                target.copy_(source)


@dataclass(frozen=True)
class FoldedBlock:
    """A block whose norms are one factor per row.

    Attributes:
        qkv: `(3 · D, D)`, rows by head: query, key and value of the first head, of the second, …; `(2 · D, D)` without
            values.
        proj: `(D, D)`.
        up: `(I, D)`, or `(2 · I, D)` with interleaved rows of gate and up.
        down: `(D, I)`.
        activation: `"silu"`, `"gelu"` or `"gelu_tanh"`.
        gated: whether `up` contains gates.
        eps: eps of both norms.
        num_heads: H.
        zero_mean: whether rows of the residual stream have zero mean.
        subtracts_mean: whether the norms subtract the mean of rows, which then have one.
        value: `(D, D)` where values have a separate weight, else `None`.
    """

    qkv: GemmWeight
    proj: GemmWeight
    up: GemmWeight
    down: GemmWeight
    activation: str
    gated: bool
    eps: float
    num_heads: int
    zero_mean: bool
    value: GemmWeight | None = None
    subtracts_mean: bool = False

    @classmethod
    def of(cls, block: Block, rope_permutation: Tensor | None = None, *, centre: bool = True) -> FoldedBlock:
        """Fold a block that `can_fold` accepts; its weights are not changed.

        Args:
            block: in the dtype of the GEMMs.
            rope_permutation: `(K,)` order of the channels of queries and keys, `None` for the order of the block.
            centre: give rows of the residual stream zero mean, so that LayerNorm becomes RMSNorm.
        """
        attention, mlp = block.attention, block.mlp
        assert isinstance(mlp, MLP | GatedMLP | Float8GatedMLP)
        gated, norm = not isinstance(mlp, MLP), block.norm1
        activation, factor = activation_name(mlp.activation), 1.0
        if activation == "quick_gelu":
            activation, factor = "silu", QUICK_GELU
        up = fold_norm(_first_linear(mlp), block.norm2, factor)
        zero_mean = centre and isinstance(norm, nn.LayerNorm)
        assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
        assert norm.eps is not None
        assert activation is not None
        down = fold_layer_scale(mlp.down, block.layer_scale2, zero_mean, factor)
        up, down = pad_features(up, down, 2 if gated else 1)
        qkv: Any = attention.qkv or joined(attention.qkv_linears)
        value, num_parts = None, 3
        if isinstance(qkv, Float8QKV):
            qkv, value, num_parts = qkv.query_key, fold_norm(qkv.value, norm), 2
        head_order = qkv_head_permutation(attention.num_heads, attention.head_dim, rope_permutation, num_parts)
        return cls(
            qkv=fold_norm(qkv, norm)[head_order],
            proj=fold_layer_scale(attention.proj, block.layer_scale1, zero_mean),
            up=up[interleave_gate_up(len(up.weight) // 2)] if gated else up,
            down=down,
            activation=activation,
            gated=gated,
            eps=norm.eps,
            num_heads=attention.num_heads,
            zero_mean=zero_mean,
            value=value,
            subtracts_mean=isinstance(norm, nn.LayerNorm) and not zero_mean,
        )

    def permute_gate_up(self, permutation: Sequence[int]) -> FoldedBlock:
        """The same block with its pairs of gate and up in another order.

        Args:
            permutation: order within each group of `len(permutation)` pairs; I is a multiple of that length.
        """
        rows = torch.arange(len(self.up.weight)).view(-1, len(permutation), 2)
        return dataclasses.replace(self, up=self.up[rows[:, list(permutation)].flatten()])

    @property
    def is_fp8(self) -> bool:
        """Whether the GEMMs read the residual stream, and the input of `down`, in float8."""
        return self.down.scale is not None

    @property
    def weights(self) -> tuple[GemmWeight, ...]:
        """All weights, that of the values included where they have a separate one."""
        value = () if self.value is None else (self.value,)
        return self.qkv, self.proj, self.up, self.down, *value


def can_fold(block: nn.Module) -> bool:
    """Whether `FoldedBlock` can represent a block: known modules, no overridden forward."""
    if type(block) is not Block or type(block.attention) is not PackedAttention:
        return False
    if any("forward" in vars(module) for module in block.modules()):
        return False
    parts: Any = block
    norm1, norm2, attention, mlp = parts.norm1, parts.norm2, parts.attention, parts.mlp
    if type(norm1) not in (nn.RMSNorm, nn.LayerNorm) or type(norm2) is not type(norm1):
        return False
    if norm1.eps is None or norm1.eps != norm2.eps:
        return False
    unscaled = parts.layer_scale1 is None and parts.layer_scale2 is None
    if isinstance(mlp, Float8GatedMLP):
        absorbed = isinstance(norm1, nn.RMSNorm) and norm1.weight is None and norm2.weight is None
        split_value, qkv = isinstance(attention.qkv, Float8QKV), attention.qkv
        float8 = (mlp.gate_up, mlp.down, qkv.query_key if split_value else qkv)
        plain = (attention.proj, qkv.value) if split_value else (attention.proj,)
        foldable = all(isinstance(linear, Float8Linear) for linear in float8) and all(map(is_plain_linear, plain))
        return absorbed and unscaled and foldable and all(linear.bias is None for linear in float8 + plain)
    if type(mlp) not in (MLP, GatedMLP) or norm1.weight is None or norm2.weight is None:
        return False
    if attention.qkv is not None and attention.q is not None:  # of which the first alone is used
        return False
    supported = ("silu",) if isinstance(mlp, GatedMLP) else ("silu", "quick_gelu", "gelu", "gelu_tanh")
    has_supported_activation = activation_name(mlp.activation) in supported
    scaled = type(parts.layer_scale1) is type(parts.layer_scale2) is LayerScale
    up = (mlp.gate, mlp.up) if isinstance(mlp, GatedMLP) else (mlp.up,)
    linears = (*attention.qkv_linears, attention.proj, *up, mlp.down)
    return has_supported_activation and (unscaled or scaled) and all(map(is_plain_linear, linears))


def _first_linear(mlp: MLP | GatedMLP | Float8GatedMLP) -> Any:
    if isinstance(mlp, GatedMLP):
        return joined((mlp.gate, mlp.up))
    return mlp.up if isinstance(mlp, MLP) else mlp.gate_up


def activation_name(activation: Any) -> str | None:
    """`"silu"`, `"quick_gelu"`, `"gelu"`, `"gelu_tanh"`, or `None` for another activation."""
    if isinstance(activation, nn.SiLU | SiLUActivation):
        return "silu"
    if isinstance(activation, QuickGELUActivation):
        return "quick_gelu"
    if isinstance(activation, GELUActivation):
        return "gelu"
    return "gelu_tanh" if isinstance(activation, GELUTanh) else None


def _weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in float32."""
    return linear.weight.detach().float(), None if linear.bias is None else linear.bias.detach().float()


def fold_norm(linear: nn.Linear | Float8Linear, norm: nn.Module, factor: float = 1.0) -> GemmWeight:
    """A linear layer with the weight and bias of the norm before it folded in, times `factor`, rounded once."""
    if isinstance(linear, Float8Linear):  # `absorb_norms` has folded the norm
        return GemmWeight(linear.weight, linear.bias, linear.scale[:, 0])
    weight, bias = _weight_and_bias(linear)
    if isinstance(norm, nn.LayerNorm):
        if norm.bias is not None:
            shift = weight @ norm.bias.detach().float()
            bias = shift if bias is None else bias + shift
        weight = weight * norm.weight.detach().float()
        weight = weight - weight.mean(dim=1, keepdim=True)  # removes what rounding leaves of a row's mean
    elif isinstance(norm, nn.RMSNorm) and norm.weight is not None:
        weight = weight * norm.weight.detach().float()
    if factor != 1:
        weight, bias = weight * factor, None if bias is None else bias * factor
    return GemmWeight(weight.to(linear.weight.dtype), bias)


def fold_layer_scale(
    linear: nn.Linear | Float8Linear, layer_scale: LayerScale | None, zero_mean: bool, divisor: float = 1.0
) -> GemmWeight:
    """A linear layer that adds to the residual stream, with layer scale and centring folded in, rounded once.

    Its input is divided by `divisor`.
    """
    if isinstance(linear, Float8Linear):
        return GemmWeight(linear.weight, linear.bias, linear.scale[:, 0])
    weight, bias = _weight_and_bias(linear)
    if layer_scale is None and not zero_mean and divisor == 1:
        return GemmWeight(linear.weight.detach(), bias)  # the weight itself, no copy
    weight = weight / divisor if divisor != 1 else weight
    if layer_scale is not None:
        factor = layer_scale.lambda1.detach().float()
        weight, bias = weight * factor[:, None], None if bias is None else bias * factor
    if zero_mean:
        weight = weight - weight.mean(dim=0)
        bias = None if bias is None else bias - bias.mean()
    return GemmWeight(weight.to(linear.weight.dtype), bias)


def qkv_head_permutation(num_heads: int, head_dim: int, rope_permutation: Tensor | None, num_parts: int = 3) -> Tensor:
    """Row order that groups queries, keys and values by head; with two parts, queries and keys only.

    Args:
        num_heads, head_dim: of the attention.
        rope_permutation: `(K,)` order of the channels of queries and keys within a head, or `None`.
        num_parts: 3, or 2 without values.
    """
    rows = torch.arange(num_parts * num_heads * head_dim).view(num_parts, num_heads, head_dim)
    if rope_permutation is not None:
        rows = torch.cat((rows[:2, :, rope_permutation], rows[2:]))
    return rows.transpose(0, 1).flatten()


def pad_features(up: GemmWeight, down: GemmWeight, num_parts: int) -> tuple[GemmWeight, GemmWeight]:
    """Feed-forward weights with zero features up to a multiple of `HALF_ALIGNMENT`; all activations of zero are zero.

    Args:
        up: `(num_parts · I, D)`.
        down: `(D, I)`.
        num_parts: 2 where `up` contains gates.
    """
    missing = -down.weight.shape[1] % HALF_ALIGNMENT
    if not missing:
        return up, down
    weight = F.pad(up.weight.unflatten(0, (num_parts, -1)), (0, 0, 0, missing)).flatten(0, 1)
    bias = None if up.bias is None else F.pad(up.bias.unflatten(0, (num_parts, -1)), (0, missing)).flatten()
    return GemmWeight(weight, bias), dataclasses.replace(down, weight=F.pad(down.weight, (0, missing)))


def interleave_gate_up(size: int) -> Tensor:
    """Row order that interleaves `size` rows of gate with as many of up."""
    return torch.arange(2 * size).view(2, size).T.flatten()

"""Matrix products in float8 (e4m3): weights scaled by row once, activations by row as they come.

With activations scaled by row, what a token becomes depends on no other token of the pack. Patch embedding, attention
and pooling stay as they are, and so do some linear maps of the layers, see `to_float8`; the weights of norms may go
into the maps after them, see `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from nopad.kernels.sdpa import without_autocast
from nopad.layers.linear import joined
from nopad.layers.mlp import Activation, GatedMLP

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
# Rows of zeros would divide by zero; no activation of a model is so small.
SMALLEST_AMAX = 1e-12
ALIGNMENT = 16
FIRST = 2
"""The first 1 / FIRST of the blocks keep their values in the dtype that they had."""
SCALES = 16
"""Scales of a row that are tried, up to twice the smallest."""
BLOCK = 64
"""Rows of a weight that a CPU tries at a time, which stay in its cache."""
INTEGERS = {FLOAT8: torch.uint8, torch.float32: torch.int32}


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest value becomes float8's largest.

    Args:
        values: `(M, K)`.

    Returns:
        `(M, K)` float8 and `(M, 1)` float32: their product is about `values`.
    """
    values = values.float()
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX) / LARGEST
    return (values / scale).to(FLOAT8), scale


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, with the scale of each row that loses least of it.

    Rounding to a floating-point number is coarse just above a power of two and fine just below the next: where a row's
    values fall is worth trying. Of 16 scales up to twice the smallest, the best leaves a tenth less of the error for
    rows of normal values.
    """
    together = max(len(weight), 1) if weight.is_cuda else BLOCK
    parts = [_round_rows(rows) for rows in weight.split(together)]
    values = torch.cat([values.view(torch.uint8) for values, _ in parts])
    return values.view(FLOAT8), torch.cat([scale for _, scale in parts])


def _round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    rounded, smallest = quantize_rows(weight)
    best, scale, least = rounded.view(torch.uint8), smallest, _loss(rounded, smallest, weight)
    for step in range(1, SCALES):
        tried = smallest * 2 ** (step / SCALES)
        rounded = (weight / tried).to(FLOAT8)
        loss = _loss(rounded, tried, weight)
        best = torch.where(loss < least, rounded.view(torch.uint8), best)
        scale, least = torch.where(loss < least, tried, scale), torch.minimum(loss, least)
    return best.view(FLOAT8), scale


def _loss(rounded: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (rounded.float() * scale - weight).square().sum(dim=1, keepdim=True)


def product(left: Tensor, left_scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(left · left_scale) @ (right · right_scale)ᵀ`, added up in float32.

    Args:
        left: `(M, K)` float8, with scales `(M, 1)` float32.
        right: `(N, K)` float8, with scales `(N, 1)` float32.
        dtype: of the result; bfloat16 on a GPU.

    Returns:
        `(M, N)`.
    """
    if left.is_cuda:
        scaled: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return scaled(left, right.T, left_scale, right_scale.T, out_dtype=dtype, use_fast_accum=True)
    with without_autocast(left.device):
        return ((left.float() @ right.float().T) * left_scale * right_scale.T).to(dtype)


class Float8Linear(nn.Module):
    """A linear map whose weight is float8.

    Raises:
        ValueError: sizes that the GPU's product cannot take.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        check(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.scale = (nn.Buffer(part) for part in round_weight(linear.weight.detach()))
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    def forward(self, input: Tensor) -> Tensor:
        """`(T, in)` to `(T, out)`."""
        return self.multiply(*quantize_rows(input), output_dtype(input))

    def multiply(self, quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`(T, in)` float8 and `(T, 1)` to `(T, out)`."""
        output = product(quantized, scale, self.weight, self.scale, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        # As integers, which are moved and never cast: to another dtype goes the bias alone.
        def keep(tensor: Tensor) -> Tensor:
            if tensor is self.bias:
                return fn(tensor)
            return fn(tensor.view(INTEGERS[tensor.dtype])).view(tensor.dtype)

        return super()._apply(keep, recurse)


def output_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a linear map gives: autocast's, where that is on."""
    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else input.dtype


class Float8QKV(nn.Module):
    """Queries and keys in float8, values as they are.

    Raises:
        ValueError: see `Float8Linear`.
    """

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        check(qkv)
        number = qkv.out_features // 3
        self.query_key, self.value = Float8Linear(rows_of(qkv, 0, 2 * number)), rows_of(qkv, 2 * number, 3 * number)

    def forward(self, input: Tensor) -> Tensor:
        """`(T, D)` to `(T, 3 · D)`."""
        return torch.cat((self.query_key(input), self.value(input)), dim=1)


def rows_of(linear: nn.Linear, first: int, last: int) -> nn.Linear:
    """A linear map to some of the values of another."""
    part = nn.Linear(linear.in_features, last - first, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[first:last].clone(), requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[first:last].clone(), requires_grad=False)
    return part


def takes_apart(linear: Any) -> bool:
    """Whether a module is a linear map and nothing else, in a floating-point dtype."""
    plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter
    return plain and linear.weight.is_floating_point()


def check(linear: Any) -> None:
    """Refuse what cannot become float8, before anything does.

    Raises:
        ValueError: sizes that are no multiples of `ALIGNMENT`, which the GPU's product does not take, or more than a
            plain linear map.
    """
    check_apart(linear)
    if linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT:
        raise ValueError(
            f"precision 'fp8': expected sizes that are multiples of {ALIGNMENT}, "
            f"got a linear map of {linear.in_features} to {linear.out_features}"
        )


def check_apart(linear: Any) -> None:
    """Refuse what is more than a plain linear map.

    Raises:
        ValueError: an adapter, a quantised map, or another module.
    """
    if not takes_apart(linear):
        raise ValueError(
            f"precision 'fp8': expected linear maps of a floating-point weight, got {type(linear).__name__}; "
            f"merge it into its weight, or load the checkpoint with precision='fp8' first"
        )


class Float8GatedMLP(nn.Module):
    """`GatedMLP` with SiLU in float8: gate, product and the cast of what goes down are one pass.

    Args:
        gate_up: one map for both, gate before up.
        activation: of the gate.
        down: the map behind them.

    Raises:
        ValueError: see `Float8Linear`.
    """

    def __init__(self, gate_up: nn.Linear, activation: Activation, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up = Float8Linear(gate_up)
        self.activation = activation
        self.down = Float8Linear(down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        fed, scale = silu_mul_quantize(self.gate_up(hidden_states))
        return self.down.multiply(fed, scale, output_dtype(hidden_states))


def silu_mul_quantize(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows(silu(gate) · up)`.

    Args:
        gate_up: `(M, 2 · I)`, gate before up.

    Returns:
        `(M, I)` float8 and `(M, 1)` float32.
    """
    if gate_up.is_cuda:
        from nopad.inference import triton_kernels

        return triton_kernels.silu_mul_quantize(gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize_rows(F.silu(gate) * up)


def check_block(layer: Any, number: int) -> None:
    """Refuse a block that cannot become float8, before anything does.

    Raises:
        ValueError: see `check`; hooks of modules that others take the place of.
    """
    attention, mlp = layer.attention, layer.mlp
    up = (mlp.gate, mlp.up) if isinstance(mlp, GatedMLP) else (mlp.up,)
    for linear in (attention.q, attention.k, attention.v, *up, mlp.down):
        check(linear)
    check_apart(attention.proj)
    replaced = {layer.norm1, layer.norm2, attention.q, attention.k, attention.v, *mlp.modules()}
    for name, module in layer.named_modules():
        if module in replaced and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"precision 'fp8': expected no hooks on modules that others take the place of, got one on "
                f"layers.{number}.{name}; register it afterwards"
            )


def to_float8(layers: nn.ModuleList) -> None:
    """Make the linear maps of the layers float8 ones, or none where one of them cannot be.

    Maps of one input become one: queries, keys and values, gate and up. What follows the attention is left as it is:
    the cast of what comes out of the attention, which no product could do, would cost what the faster product saves. So
    are values of the first half of the blocks: what is lost there goes through all blocks after, and in images of a few
    patches no sum over keys evens it out.

    Raises:
        ValueError: see `check_block`.
    """
    blocks: Any = list(layers)
    for number, layer in enumerate(blocks):
        check_block(layer, number)
    for number, layer in enumerate(blocks):
        attention, mlp, dtype = layer.attention, layer.mlp, layer.attention.proj.weight.dtype
        qkv = joined((attention.q, attention.k, attention.v))
        gated = isinstance(mlp, GatedMLP) and isinstance(mlp.activation, nn.SiLU | SiLUActivation)
        up = joined((mlp.gate, mlp.up)) if gated else mlp.up
        normed = isinstance(layer.norm1, nn.RMSNorm) and isinstance(layer.norm2, nn.RMSNorm)
        if gated and normed and qkv.bias is None and up.bias is None:
            prepare(layer, qkv, up)
        if gated:
            layer.mlp = Float8GatedMLP(up, mlp.activation, mlp.down)
        else:
            for name in ("gate", "up", "down") if isinstance(mlp, GatedMLP) else ("up", "down"):
                setattr(mlp, name, Float8Linear(getattr(mlp, name)))
        if number < len(blocks) / FIRST:
            attention.qkv = Float8QKV(qkv)
            attention.qkv.value.to(dtype)  # `prepare` has left float32
        else:
            attention.qkv = Float8Linear(qkv)
        attention.q = attention.k = attention.v = None


@torch.no_grad()
def prepare(layer: Any, qkv: nn.Linear, gate_up: nn.Linear) -> None:
    """Move factors of a layer to where they are rounded once; what it computes stays the same.

    The weights of its norms go into the matrices after them. `up` is divided, and the columns of `down` are multiplied,
    by powers of two that keep `silu(gate) · up` below float8's largest number whatever comes in: a normed row has the
    length `sqrt(D)`, and on a sphere of that radius two linear forms multiply to at most
    `D · (|a| |b| + |a · b|) / 2`. So it can be rounded to float8 before its largest value is known.

    Args:
        layer: its norms lose their weights, its `mlp.down` gets another.
        qkv, gate_up: the layer's maps, joined; they get other weights, in float32.
    """
    for name, linear in (("norm1", qkv), ("norm2", gate_up)):
        norm = getattr(layer, name)
        linear.weight = nn.Parameter(linear.weight.float() * norm.weight.float(), requires_grad=False)
        setattr(layer, name, nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))
    gate, up = gate_up.weight.chunk(2)
    bound = gate.shape[1] * (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(dim=1).abs()) / 2
    # A gate or an up of zeros has a bound of zero: what comes of it is zero with any factor that overflows nothing.
    factor = (bound / LARGEST).clamp(2.0**-60, 2.0**60).log2().ceil().exp2()
    gate_up.weight = nn.Parameter(torch.cat((gate, up / factor[:, None])), requires_grad=False)
    layer.mlp.down.weight = nn.Parameter(layer.mlp.down.weight.float() * factor, requires_grad=False)

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

from nopad.layers.mlp import GatedMLP

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
        bias = bias_of(linear)
        self.bias = None if bias is None else nn.Buffer(bias)

    def forward(self, input: Tensor) -> Tensor:
        """`(T, in)` to `(T, out)`."""
        return self.multiply(*quantize_rows(input), input.dtype)

    def multiply(self, quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """`(T, in)` float8 and `(T, 1)` to `(T, out)`."""
        output = product(quantized, scale, self.weight, self.scale, dtype)
        return output if self.bias is None else output + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float8Linear:
        # As integers, which are moved and never cast: to another dtype goes the bias alone.
        def keep(tensor: Tensor) -> Tensor:
            if tensor is self.bias:
                return fn(tensor)
            return fn(tensor.view(INTEGERS[tensor.dtype])).view(tensor.dtype)

        return super()._apply(keep, recurse)


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
    if (bias := bias_of(linear)) is not None:
        part.bias = nn.Parameter(bias[first:last].clone(), requires_grad=False)
    return part


def bias_of(linear: nn.Linear) -> Tensor | None:
    """What a map makes of zero: its bias, in whatever form it keeps that."""
    if linear.bias is None:
        return None
    zero = linear.weight.new_zeros(1, linear.in_features)
    return type(linear).forward(linear, zero)[0].detach()  # no hook sees it


def takes_apart(linear: Any) -> bool:
    """Whether a module is a linear map and nothing else, in a floating-point dtype."""
    affine = type(linear) is nn.Linear or (isinstance(linear, nn.Linear) and hasattr(type(linear), "is_affine"))
    return affine and linear.weight.is_floating_point()


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

    Raises:
        ValueError: see `Float8Linear`.
    """

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.gate_up = Float8Linear(mlp.gate_up)
        self.activation = mlp.activation
        self.down = Float8Linear(mlp.down)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        fed, scale = silu_mul_quantize(self.gate_up(hidden_states))
        return self.down.multiply(fed, scale, hidden_states.dtype)


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
    parts = dict(layer.named_modules())
    up = "mlp.gate_up" if isinstance(layer.mlp, GatedMLP) else "mlp.up"
    for name in ("attention.qkv", up, "mlp.down"):
        check(parts.get(name))
    check_apart(parts.get("attention.proj"))
    for name, module in parts.items():
        replaced = name.startswith(("norm", "mlp", "attention.qkv"))
        if replaced and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"precision 'fp8': expected no hooks on modules that others take the place of, got one on "
                f"layers.{number}.{name}; register it afterwards"
            )


def to_float8(layers: nn.ModuleList) -> None:
    """Make the linear maps of the layers float8 ones, or none where one of them cannot be.

    What follows the attention is left as it is: the cast of what comes out of the attention, which no product could
    do, would cost what the faster product saves. So are values of the first half of the blocks: what is lost there goes
    through all blocks after, and in images of a few patches no sum over keys evens it out.

    Raises:
        ValueError: see `check_block`.
    """
    blocks: Any = list(layers)
    kept = [layer.attention.proj for layer in blocks]
    for number, layer in enumerate(blocks):
        check_block(layer, number)
    for number, layer in enumerate(blocks):
        gated = isinstance(layer.mlp, GatedMLP) and isinstance(layer.mlp.activation, nn.SiLU | SiLUActivation)
        normed = isinstance(layer.norm1, nn.RMSNorm) and isinstance(layer.norm2, nn.RMSNorm)
        if gated and normed and layer.attention.qkv.bias is None and layer.mlp.gate_up.bias is None:
            prepare(layer)
        if gated:
            layer.mlp = Float8GatedMLP(layer.mlp)
        if number < len(blocks) / FIRST:
            layer.attention.qkv = Float8QKV(layer.attention.qkv)
            kept.append(layer.attention.qkv.value)
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and module not in kept:
                layer.set_submodule(name, Float8Linear(module))
    for linear in kept:
        linear.to(blocks[0].attention.proj.weight.dtype)  # `prepare` has left float32


@torch.no_grad()
def prepare(layer: Any) -> None:
    """Move factors of a layer to where they are rounded once; what it computes stays the same.

    The weights of its norms go into the matrices after them. `up` is divided, and the columns of `down` are multiplied,
    by powers of two that keep `silu(gate) · up` below float8's largest number whatever comes in: a normed row has the
    length `sqrt(D)`, and on a sphere of that radius two linear forms multiply to at most
    `D · (|a| |b| + |a · b|) / 2`. So it can be rounded to float8 before its largest value is known.
    """
    for norm, linear in ((layer.norm1, layer.attention.qkv), (layer.norm2, layer.mlp.gate_up)):
        linear.weight = nn.Parameter(linear.weight.float() * norm.weight.float(), requires_grad=False)
    for name in ("norm1", "norm2"):
        norm = getattr(layer, name)
        setattr(layer, name, nn.RMSNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False))
    weight = layer.mlp.gate_up.weight
    gate, up = weight.chunk(2)
    bound = weight.shape[1] * (gate.norm(dim=1) * up.norm(dim=1) + (gate * up).sum(dim=1).abs()) / 2
    # A gate or an up of zeros has a bound of zero: what comes of it is zero with any factor that overflows nothing.
    factor = (bound / LARGEST).clamp(2.0**-60, 2.0**60).log2().ceil().exp2()
    layer.mlp.gate_up.weight = nn.Parameter(torch.cat((gate, up / factor[:, None])), requires_grad=False)
    layer.mlp.down.weight = nn.Parameter(layer.mlp.down.weight.float() * factor, requires_grad=False)

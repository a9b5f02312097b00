"""What linear layers of all formats for inference have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nopad.kernels.gemm_formats import FP8
from nopad.kernels.sdpa import has_autocast
from nopad.layers.linear import is_plain_linear

SAME_SIZE_INTEGER = {FP8: torch.uint8, torch.int8: torch.int8, torch.float32: torch.int32}


class QuantizedLinear(nn.Module):
    """Base class: a linear layer with a rounded weight, one scale per output, and inputs that are rounded by row.

    Attributes:
        precision: the format, as `nopad.load` takes it.
        weight: `(out, in)` in that format.
        scale: `(out, 1)` float32.
        bias: the bias in the layer's dtype, or `None`.

    Raises:
        ValueError: see `check_linear`.
    """

    precision: ClassVar[str]

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.check_linear(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = self.round_weight(linear.weight.detach())
        self.weight, self.scale = nn.Buffer(weight), nn.Buffer(scale)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach())

    @classmethod
    def check_linear(cls, linear: Any) -> None:
        """Check that a linear layer can be converted.

        Raises:
            ValueError: see `check_plain_linear`; sizes that the format's GEMMs do not take.
        """
        check_plain_linear(linear, cls.precision)

    @staticmethod
    def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded weight and its scales."""
        raise NotImplementedError

    @staticmethod
    def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded rows `(T, in)` and their scales `(T, 1)`."""
        raise NotImplementedError

    @staticmethod
    def scaled_mm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
        """`(a · scale_a) @ (b · scale_b)ᵀ` in `dtype`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """`(T, in)` to `(T, out)`."""
        return self.multiply(*self.quantize_rows(input), output_dtype(input))

    def multiply(self, quantized: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded rows `(T, in)` with scales `(T, 1)` to `(T, out)` in `dtype`."""
        output = self.scaled_mm(quantized, scale, self.weight, self.scale, dtype)
        return output if self.bias is None else output + self.bias.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # Weight and scale are moved as integers, so that `.to(dtype)` casts the bias only.
        def move(tensor: Tensor) -> Tensor:
            if tensor is self.bias:
                return fn(tensor)
            return fn(tensor.view(SAME_SIZE_INTEGER[tensor.dtype])).view(tensor.dtype)

        return super()._apply(move, recurse)


def output_dtype(input: Tensor) -> torch.dtype:
    """The dtype that `nn.Linear` returns for `input`: autocast's where it is enabled."""
    kind = input.device.type
    return torch.get_autocast_dtype(kind) if has_autocast(kind) and torch.is_autocast_enabled(kind) else input.dtype


def check_plain_linear(linear: Any, precision: str) -> None:
    """Check that a module is a plain linear layer.

    Raises:
        ValueError: an adapter, a quantised layer, or another module.
    """
    if not is_plain_linear(linear):
        raise ValueError(
            f"precision {precision!r}: expected linear layers with a floating-point weight, got "
            f"{type(linear).__name__}; merge it into its weight, or load the checkpoint with precision={precision!r} "
            f"first"
        )


def check_hooks(block: nn.Module, index: int, replaced: Collection[nn.Module], precision: str) -> None:
    """Check that modules of a block that a conversion replaces have no hooks.

    Raises:
        ValueError: one has.
    """
    for name, module in block.named_modules():
        if module in replaced and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"precision {precision!r}: expected no hooks on modules that the conversion replaces, got one on "
                f"layers.{index}.{name}; register it afterwards"
            )

"""Linear layers for inference on a CPU, with what follows them as epilogues."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.inference.fusion.folding import GemmWeight
from nopad.inference.fusion.gemm import ACTIVATIONS

_EPILOGUES = {"silu": ("swish", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
"""oneDNN's name and algorithm of each activation."""


class CPULinear(Protocol):
    """A linear layer over blocks of as many rows as it was made for.

    Attributes:
        name: name of what computes it, for reports.
        min_block_rows: blocks of fewer rows are slow.
    """

    name: str
    min_block_rows: int

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """`activation(x @ weightᵀ + bias)`, `(R, K)` to `(R, N)`."""
        ...

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """`x @ weightᵀ + bias + other`, `other` of `(R, N)`."""
        ...

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """`(x @ weightᵀ + bias) · other`, `other` of `(R, N)`."""
        ...


class OneDNNLinear:
    """A weight in the layout that oneDNN selects for blocks of so many rows, made once.

    Args:
        weight: copied.
        num_rows: R.
    """

    name = "onednn"
    min_block_rows = 256

    def __init__(self, weight: GemmWeight, num_rows: int) -> None:
        mkldnn: Any = torch.ops.mkldnn
        dtype = weight.weight.dtype
        self.weight = mkldnn._reorder_linear_weight(weight.weight.contiguous(), num_rows)
        self.bias = None if weight.bias is None else weight.bias.to(dtype)
        self.run, self.run_binary = mkldnn._linear_pointwise, mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """See `CPULinear`."""
        name, algorithm = ("none", "") if activation is None else _EPILOGUES[activation]
        return self.run(x, self.weight, self.bias, name, [], algorithm)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """See `CPULinear`."""
        return self.run_binary(x, other, self.weight, self.bias, "add")

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """See `CPULinear`."""
        return self.run_binary(x, other, self.weight, self.bias, "mul")


class TorchLinear:
    """The same by torch's own GEMM (MKL on x86), for processors that oneDNN is not built for, or is slower on."""

    name = "torch"
    min_block_rows = 1024  # each call lays the weight out again

    def __init__(self, weight: GemmWeight, num_rows: int) -> None:
        self.weight = weight.weight
        self.bias = None if weight.bias is None else weight.bias.to(weight.weight.dtype)

    def __call__(self, x: Tensor, activation: str | None = None) -> Tensor:
        """See `CPULinear`."""
        output = F.linear(x, self.weight, self.bias)
        return output if activation is None else ACTIVATIONS[activation](output)

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """See `CPULinear`."""
        return self(x).add_(other)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """See `CPULinear`."""
        return self(x).mul_(other)


def linear_class(dtype: torch.dtype) -> type[OneDNNLinear] | type[TorchLinear]:
    """The fastest that runs in `dtype` on this processor."""
    mkldnn: Any = torch.ops.mkldnn
    has_operator = torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_linear_pointwise")
    if has_operator and dtype == torch.float32 and not _has_avx2_alone():
        return OneDNNLinear
    if has_operator and dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported():
        return OneDNNLinear
    return TorchLinear


def _has_avx2_alone() -> bool:
    """Whether this processor has AVX2 and not AVX-512: oneDNN's activations as epilogues are slow there."""
    cpu: Any = torch.cpu
    return cpu._is_avx2_supported() and not cpu._is_avx512_supported()

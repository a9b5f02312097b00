"""int8 with one scale per row: rounding and GEMM.

Activations are scaled by row, so what a token becomes does not depend on the other tokens of the pack. Sums of integers
are exact, so it depends on no order of addition either.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.kernels.sdpa import without_autocast
from nopad.kernels.tracing import constant_result

_int_mm: Any = torch._int_mm  # pyright: ignore[reportPrivateImportUsage]
INT8_MAX = 127
"""Largest absolute value; -128 is left out, so that the range is symmetric."""
MIN_AMAX = 1e-12
"""Lower bound of a row's largest absolute value, against division by zero; no activation of a model is so small."""


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest absolute value becomes 127, and round it to the nearest integers.

    Args:
        values: `(M, K)`.

    Returns:
        `(M, K)` int8 and `(M, 1)` scales in the dtype of `values`; their product approximates `values`. A row that is
        not finite has a scale that is not.
    """
    amax = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
    scale = (amax.float().clamp_(min=MIN_AMAX) / INT8_MAX).to(values.dtype)
    # Divided in float32 by the scale that results are multiplied by.
    return torch.mul(values, scale.float().reciprocal()).round_().to(torch.int8), scale


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, with float32 scales."""
    return quantize_rows(weight.float())


def scaled_mm(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """`(a · scale_a) @ (b · scale_b)ᵀ`.

    Args:
        a: `(M, K)` int8, with scales `(M, 1)`.
        b: `(N, K)` int8, with scales `(N, 1)` float32.
        dtype: dtype of the result.

    Returns:
        `(M, N)`.
    """
    return (multiply_integers(a, b) * scale_a.float() * scale_b.T).to(dtype)


def multiply_integers(a: Tensor, b: Tensor) -> Tensor:
    """`a @ bᵀ` of int8 matrices, `(M, K)` and `(N, K)`, as float32.

    Without instructions for it (VNNI, AMX) torch's GEMM adds pairs of products in 16 bits, which overflow. There
    float32 multiplies: exactly up to K = 1,040, beyond that as exactly as it multiplies other numbers.
    """
    if int_mm_is_exact():
        return _int_mm(a, b.T).float()
    with without_autocast(a.device):
        return a.float() @ b.float().T


@constant_result
def int_mm_is_exact() -> bool:
    """Whether torch's GEMM of int8 is exact on this processor."""
    return is_exact(_int_mm)


@lru_cache
def is_exact(int_mm: Any) -> bool:
    """Whether a GEMM of int8, `(M, K)` by `(K, N)`, is exact on this processor where sums are largest."""
    a = torch.full((32, 64), INT8_MAX, dtype=torch.int8)
    a[1::2] = -INT8_MAX
    try:
        return torch.equal(int_mm(a, a.T).double(), a.double() @ a.double().T)
    except (RuntimeError, NotImplementedError):
        return False

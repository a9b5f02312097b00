"""A GEMM with SwiGLU in its epilogue, as a Triton kernel; importable only where Triton is installed.

cuBLAS would write gates and ups, and another kernel would read them again: on an H100 that takes four tenths more time
than this kernel, which keeps them in registers (docs/tuning.md). It loads tiles by Hopper's tensor memory
accelerator (TMA).
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # pyright: ignore[reportMissingImports]

from nopad.kernels.gemm_formats import HALF_ALIGNMENT

TILE_M, TILE_N, TILE_K = 128, 128, 64
"""Tile sizes: the fastest of those measured on an H100."""
GROUP_M = 8
"""Tiles along M that one column of weight tiles is multiplied with in sequence, while it is in the cache."""


def supports(size: int, hidden_size: int, device: torch.device) -> bool:
    """Whether `swiglu_gemm` runs on this device for `size` gates and inputs of `hidden_size`."""
    return (
        torch.cuda.get_device_capability(device)[0] == 9 and size % HALF_ALIGNMENT == hidden_size % HALF_ALIGNMENT == 0
    )


def swiglu_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu(gate) · up` of `x @ weightᵀ + bias`, computed in float32 and rounded once.

    Args:
        x: `(T, D)` in half precision.
        weight: `(2 · I, D)`, interleaved rows of gate and up; D and I are multiples of `HALF_ALIGNMENT`.
        bias: `(2 · I,)` float32 or `None`.

    Returns:
        `(T, I)`.
    """
    m, k = x.shape
    gate, up = weight.view(-1, 2, k).unbind(1)
    output = x.new_empty(m, len(gate))
    num_programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _swiglu_gemm[(num_programs,)](  # pyright: ignore[reportIndexIssue]
        _descriptor(x, TILE_M, TILE_K),
        _descriptor(gate, TILE_N, TILE_K),
        _descriptor(up, TILE_N, TILE_K),
        _descriptor(output, TILE_M, TILE_N),
        bias,
        m,
        len(gate),
        k,
        num_programs,
        TILE_M,
        TILE_N,
        TILE_K,
        GROUP_M,
        num_warps=8,
        num_stages=3,
    )
    return output


def _descriptor(matrix: Tensor, tile_rows: int, tile_columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [tile_rows, tile_columns])


@triton.jit
def _swiglu_gemm(
    x_desc,
    gate_desc,
    up_desc,
    output_desc,
    bias,
    m,
    n,
    k,
    num_programs,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(m, TILE_M), tl.cdiv(n, TILE_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, num_programs):
        first_m = tile // (GROUP_M * tiles_n) * GROUP_M
        in_group = tile % (GROUP_M * tiles_n)
        group_size = tl.minimum(tiles_m - first_m, GROUP_M)
        row, column = (first_m + in_group % group_size) * TILE_M, in_group // group_size * TILE_N
        gate = tl.zeros((TILE_M, TILE_N), tl.float32)
        up = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k_start in range(0, k, TILE_K):
            x = x_desc.load([row, k_start])
            gate = tl.dot(x, gate_desc.load([column, k_start]).T, gate)
            up = tl.dot(x, up_desc.load([column, k_start]).T, up)
        if bias is not None:
            offset = column + tl.arange(0, TILE_N)
            gate += tl.load(bias + 2 * offset, mask=offset < n, other=0.0)[None, :]
            up += tl.load(bias + 2 * offset + 1, mask=offset < n, other=0.0)[None, :]
        output_desc.store([row, column], (gate * tl.sigmoid(gate) * up).to(output_desc.dtype))

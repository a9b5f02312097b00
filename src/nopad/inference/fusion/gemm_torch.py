"""GEMM backend for any GPU with Triton: cuBLAS, and Triton kernels for SwiGLU and the pointwise operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import ACTIVATIONS, QKV, InterleavedRope, split_qkv
from nopad.kernels import triton_pointwise, triton_swiglu


@dataclass(frozen=True)
class TorchState:
    """The residual stream between two GEMMs.

    Attributes:
        tokens: `(T, D)`, which the next residual GEMM overwrites.
        normed: `(T, D)` input of the next GEMM.
        pending_bias: `(D,)` float32 that is still to be added to every row of `tokens`, or `None`.
    """

    tokens: Tensor
    normed: Tensor
    pending_bias: Tensor | None


class TorchGemm:
    """See `GemmBackend`.

    A residual GEMM accumulates into the tokens in place. Such a GEMM takes no bias, so biases stay pending until the
    next norm, which reads all rows anyway.
    """

    name = "torch"

    def prepack(self, block: FoldedBlock) -> FoldedBlock:
        """See `GemmBackend`."""
        return block

    def prepare_rope(self, rope: InterleavedRope) -> InterleavedRope:
        """See `GemmBackend`."""
        return rope

    def start(self, tokens: Tensor, block: FoldedBlock) -> TorchState:
        """See `GemmBackend`."""
        if block.zero_mean:
            triton_pointwise.start_residual(tokens, block.eps, zero_mean=True, fp8_row_rms=None, sum_sq=None)
        return self._state(tokens, None, block)

    def qkv(self, state: TorchState, block: FoldedBlock, rope: object) -> QKV:
        """See `GemmBackend`."""
        qkv = linear(state.normed, block.qkv)
        if isinstance(rope, InterleavedRope):
            triton_pointwise.apply_rotary_(qkv.unflatten(1, (block.num_heads, 3, -1)), rope.cos, rope.sin)
        return split_qkv(qkv, None, block)

    def up(self, state: TorchState, block: FoldedBlock) -> Tensor:
        """See `GemmBackend`."""
        weight = block.up
        if block.activation == "gelu_tanh" and weight.bias is not None:
            bias = weight.bias.to(weight.weight.dtype)
            addmm_gelu: Any = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
            return addmm_gelu(bias, state.normed, weight.weight.T, use_gelu=True)
        n, k = weight.weight.shape
        if block.gated and triton_swiglu.supports(n // 2, k, state.normed.device):
            return triton_swiglu.swiglu_gemm(state.normed, weight.weight, weight.bias)
        output = linear(state.normed, weight)
        return triton_pointwise.silu_mul(output) if block.gated else ACTIVATIONS[block.activation](output)

    def residual_gemm(self, x: Tensor, weight: GemmWeight, state: TorchState, block: FoldedBlock) -> TorchState:
        """See `GemmBackend`."""
        tokens, pending_bias = state.tokens.addmm_(x, weight.weight.T), state.pending_bias
        if weight.bias is not None:
            pending_bias = weight.bias if pending_bias is None else pending_bias + weight.bias
        return self._state(tokens, pending_bias, block)

    def finish(self, state: TorchState) -> Tensor:
        """See `GemmBackend`."""
        if state.pending_bias is None:
            return state.tokens
        return (state.tokens + state.pending_bias).to(state.tokens.dtype)

    def _state(self, tokens: Tensor, pending_bias: Tensor | None, block: FoldedBlock) -> TorchState:
        normed = triton_pointwise.norm(tokens, pending_bias, block.eps, subtract_mean=block.subtracts_mean)
        return TorchState(tokens, normed, pending_bias)


def linear(x: Tensor, weight: GemmWeight) -> Tensor:
    """`x @ weightᵀ + bias`."""
    return F.linear(x, weight.weight, None if weight.bias is None else weight.bias.to(weight.weight.dtype))

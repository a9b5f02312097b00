"""Reference GEMM backend (float32, plain torch) that the fast backends are tested against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import ACTIVATIONS, FP8_ROW_RMS, QKV, InterleavedRope, split_qkv, subtract_mean
from nopad.kernels.gemm_formats import FP8, FP8_MAX
from nopad.layers.rope_3d import apply_rotary_interleaved


@dataclass(frozen=True)
class ReferenceState:
    """The residual stream between two GEMMs.

    Attributes:
        tokens: `(T, D)`.
        gemm_input: `(T, D)` tokens, or in float8 `tokens · FP8_ROW_RMS / rms`, with the rms of the tokens before the
            last residual sum.
        sum_sq: `(T, 1)` float32, sum of squares of each row of `tokens`, less its mean where norms subtract that.
        prev_sum_sq: `(T, 1)` float32, the same of the tokens whose rms scales `gemm_input`; `None` without float8.
    """

    tokens: Tensor
    gemm_input: Tensor
    sum_sq: Tensor
    prev_sum_sq: Tensor | None

    def for_weight(self, weight: GemmWeight) -> ReferenceState:
        """The state that a GEMM with this weight reads: without float8, its input is the tokens themselves."""
        if self.prev_sum_sq is None or weight.scale is not None:
            return self
        return replace(self, gemm_input=self.tokens, prev_sum_sq=None)


class ReferenceGemm:
    """See `GemmBackend`; every result is computed in float32 and rounded once."""

    name = "reference"

    def prepack(self, block: FoldedBlock) -> FoldedBlock:
        """See `GemmBackend`."""
        return block

    def prepare_rope(self, rope: InterleavedRope) -> InterleavedRope:
        """See `GemmBackend`."""
        return rope

    def start(self, tokens: Tensor, block: FoldedBlock) -> ReferenceState:
        """See `GemmBackend`."""
        values = subtract_mean(tokens.float()) if block.zero_mean else tokens.float()
        row_sums = sum_sq(values, block)
        prev = row_sums if block.is_fp8 else None
        return self._state(values.to(tokens.dtype), values, row_sums, prev, block)

    def qkv(self, state: ReferenceState, block: FoldedBlock, rope: object) -> QKV:
        """See `GemmBackend`."""
        dtype = state.tokens.dtype
        value = None if block.value is None else self._norm_gemm(state, block.value, block)
        query, key, value = split_qkv(self._norm_gemm(state, block.qkv, block), value, block)
        if isinstance(rope, InterleavedRope):
            cos, sin = rope.cos[:, None], rope.sin[:, None]
            query, key = apply_rotary_interleaved(query, cos, sin), apply_rotary_interleaved(key, cos, sin)
        return query.to(dtype), key.to(dtype), value.to(dtype)

    def up(self, state: ReferenceState, block: FoldedBlock) -> Tensor:
        """See `GemmBackend`."""
        values, act = self._norm_gemm(state, block.up, block), ACTIVATIONS[block.activation]
        if not block.gated:
            return act(values).to(state.tokens.dtype)
        gate, up = values.unflatten(1, (-1, 2)).unbind(2)
        return round_to(act(gate) * up, state.gemm_input.dtype)

    def residual_gemm(self, x: Tensor, weight: GemmWeight, state: ReferenceState, block: FoldedBlock) -> ReferenceState:
        """See `GemmBackend`."""
        values = gemm(x, weight) + state.tokens.float()
        if weight.bias is not None:
            values = values + weight.bias
        prev = None if state.prev_sum_sq is None else state.sum_sq
        return self._state(values.to(state.tokens.dtype), values, sum_sq(values, block), prev, block)

    def finish(self, state: ReferenceState) -> Tensor:
        """See `GemmBackend`."""
        return state.tokens

    def _state(
        self, tokens: Tensor, values: Tensor, row_sums: Tensor, prev: Tensor | None, block: FoldedBlock
    ) -> ReferenceState:
        gemm_input = tokens if prev is None else round_to(values * (FP8_ROW_RMS * rstd(prev, values, block)), FP8)
        return ReferenceState(tokens, gemm_input, row_sums, prev)

    def _norm_gemm(self, state: ReferenceState, weight: GemmWeight, block: FoldedBlock) -> Tensor:
        state = state.for_weight(weight)
        values = gemm(state.gemm_input, weight) * norm_factor(state, block)
        return values if weight.bias is None else values + weight.bias


def norm_factor(state: ReferenceState, block: FoldedBlock) -> Tensor:
    """`(T, 1)` factor that turns rows of `gemm_input` into normed tokens."""
    factor = rstd(state.sum_sq, state.tokens, block)
    if state.prev_sum_sq is None:
        return factor
    return factor / (FP8_ROW_RMS * rstd(state.prev_sum_sq, state.tokens, block))


def sum_sq(values: Tensor, block: FoldedBlock) -> Tensor:
    """Sum of squares of each row, `(T, 1)`, less their mean where norms subtract it."""
    values = subtract_mean(values) if block.subtracts_mean else values
    return values.square().sum(dim=1, keepdim=True)


def rstd(row_sums: Tensor, tokens: Tensor, block: FoldedBlock) -> Tensor:
    """`1 / rms` of rows of the width of `tokens`, `(T, 1)`, from their sums of squares."""
    return torch.rsqrt(row_sums.sum(dim=1, keepdim=True) / tokens.shape[1] + block.eps)


def gemm(x: Tensor, weight: GemmWeight) -> Tensor:
    """`x @ weightᵀ` in float32, without the bias."""
    values = x.float() @ weight.weight.float().T
    return values if weight.scale is None else values * weight.scale


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`; float8 saturates, as a GPU's conversion does."""
    return (values.clamp(-FP8_MAX, FP8_MAX) if dtype == FP8 else values).to(dtype)

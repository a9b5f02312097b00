"""GEMM backend by quack, for Hopper: everything between two GEMMs is fused into their epilogues."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import FP8_ROW_RMS, QKV, InterleavedRope, split_qkv
from nopad.inference.fusion.quack_epilogues import Epilogues, epilogues
from nopad.inference.fusion.quack_ops import GATE_UP_PERMUTATION, ROPE_COLUMNS, EpilogueTile, pack_cos_sin
from nopad.inference.fusion.tile_config import DEFAULT_EPI_N, TileConfig, fastest, tile_configs
from nopad.kernels import triton_pointwise
from nopad.kernels.gemm_formats import FP8


@dataclass(frozen=True)
class QuackState:
    """The residual stream between two GEMMs.

    Attributes:
        tokens: `(T, D)`.
        gemm_input: `(T, D)` tokens, or in float8 `tokens · FP8_ROW_RMS / rms`, with the rms of the tokens before the
            last residual sum.
        sum_sq: `(T, n)` float32 partial sums of squares of each row of `tokens`, a slice of `sum_sq_buffer`.
        sum_sq_buffer: `(T, n + m)` float32 partial sums after the last attention, then those after the last MLP. In
            float8 the slice that is not `sum_sq` belongs to the tokens whose rms scales `gemm_input`. The next residual
            GEMM overwrites one of the slices.
    """

    tokens: Tensor
    gemm_input: Tensor
    sum_sq: Tensor
    sum_sq_buffer: Tensor

    @property
    def is_fp8(self) -> bool:
        """Whether GEMMs with a float8 weight read the tokens in float8."""
        return self.gemm_input.dtype == FP8


class QuackGemm:
    """See `GemmBackend`."""

    name = "quack"

    def __init__(self) -> None:
        self.zeros: dict[int, Tensor] = {}  # referenced here, since a CUDA graph may read them

    def prepack(self, block: FoldedBlock) -> FoldedBlock:
        """See `GemmBackend`; gates and ups get the order that `quack_ops.GatedStore` expects."""
        return block.permute_gate_up(GATE_UP_PERMUTATION) if block.gated else block

    def prepare_rope(self, rope: InterleavedRope) -> InterleavedRope | tuple[Tensor, ...]:
        """Operands of `quack_ops.RopeLoad`: one table for both channels of a pair where they share angles, else two.

        In float16, whose rounding error for numbers up to one is an eighth of bfloat16's, which the result is rounded
        to. `rope` itself for head sizes that need a kernel of their own.
        """
        head_dim = rope.cos.shape[1]
        if head_dim % ROPE_COLUMNS or not (rope.shared or head_dim <= 2 * ROPE_COLUMNS):  # limited by registers
            return rope
        channels = (0,) if rope.shared else (0, 1)
        return tuple(pack_cos_sin(rope.cos[:, channel::2], rope.sin[:, channel::2]) for channel in channels)

    def start(self, tokens: Tensor, block: FoldedBlock) -> QuackState:
        """See `GemmBackend`."""
        row_rms = FP8_ROW_RMS if block.is_fp8 else None
        attention, mlp = self._num_parts(block, tokens)
        # As many partial sums as after later GEMMs, zero except the first of each slice: the same kernels read them.
        buffer = tokens.new_zeros(attention + mlp, len(tokens), dtype=torch.float32).T
        sum_sq = buffer[:, attention:]
        gemm_input = triton_pointwise.start_residual(tokens, block.eps, block.zero_mean, row_rms, sum_sq[:, 0])
        if block.is_fp8:  # the first rows are scaled by their own rms
            buffer[:, 0] = sum_sq[:, 0]
        return QuackState(tokens, gemm_input, sum_sq, buffer)

    def qkv(self, state: QuackState, block: FoldedBlock, rope: object) -> QKV:
        """See `GemmBackend`."""
        qkv = self._norm_gemm(state, block, block.qkv, rope if isinstance(rope, tuple) else ())
        if isinstance(rope, InterleavedRope):
            triton_pointwise.apply_rotary_(qkv.unflatten(1, (block.num_heads, 3, -1)), rope.cos, rope.sin)
        return split_qkv(qkv, None if block.value is None else self._norm_gemm(state, block, block.value, ()), block)

    def _norm_gemm(
        self, state: QuackState, block: FoldedBlock, weight: GemmWeight, tables: tuple[Tensor, ...]
    ) -> Tensor:
        """Normed tokens times a weight, `(T, N)`, with rotary embedding where there are tables."""
        x = state.gemm_input if weight.scale is not None else state.tokens
        output = state.tokens.new_empty(len(x), len(weight.weight))
        epilogue, operands = self._rstd_operands(state, block, weight, needs_bias=bool(tables))
        if tables:
            assert weight.scale is None, "rotary embedding is fused in bfloat16 only"
            operands |= dict(zip(("rope", "rope1"), tables, strict=False))
            run(epilogue.rope if len(tables) == 1 else epilogue.rope_two_angles, x, weight, output, operands)
        elif weight.scale is not None:
            run(epilogue.rstd_fp8, x, weight, output, operands)
        else:
            run(epilogue.rstd if weight.bias is None else epilogue.rstd_bias, x, weight, output, operands)
        return output

    def up(self, state: QuackState, block: FoldedBlock) -> Tensor:
        """See `GemmBackend`."""
        weight, x = block.up, state.gemm_input
        epilogue, operands = self._rstd_operands(state, block, weight, needs_bias=not block.gated)
        output = x.new_empty(len(x), len(weight.weight) // (2 if block.gated else 1))
        if not block.gated:
            run(epilogue.activations[block.activation], x, weight, output, operands)
            return output
        swiglu = epilogue.swiglu if weight.bias is None else epilogue.swiglu_bias
        swiglu = swiglu if weight.scale is None else epilogue.swiglu_fp8
        run(swiglu, x, weight, None, {**operands, "out": output})
        return output

    def residual_gemm(self, x: Tensor, weight: GemmWeight, state: QuackState, block: FoldedBlock) -> QuackState:
        """See `GemmBackend`."""
        num_parts = self._num_parts(block, state.tokens)
        epilogue = epilogues(state.tokens.shape[1], block.eps, num_parts)
        operands = self._column_operands(weight)
        tokens = torch.empty_like(state.tokens)
        gemm_input = tokens
        if state.is_fp8:
            gemm_input = torch.empty_like(state.gemm_input)
            operands |= {"fp8_rstd": state.sum_sq, "fp8": gemm_input}
        if weight.scale is not None:
            residual = epilogue.residual_fp8_in_out
        elif state.is_fp8:
            residual = epilogue.residual_fp8_out
        else:
            residual = epilogue.residual if weight.bias is None else epilogue.residual_bias
        assert weight is block.proj or weight is block.down
        buffer = state.sum_sq_buffer
        sum_sq = buffer[:, : num_parts[0]] if weight is block.proj else buffer[:, num_parts[0] :]
        run(residual, x, weight, tokens, {**operands, "sum_sq": sum_sq}, state.tokens)
        return QuackState(tokens, gemm_input, sum_sq, buffer)

    def finish(self, state: QuackState) -> Tensor:
        """See `GemmBackend`."""
        return state.tokens

    def _num_parts(self, block: FoldedBlock, tokens: Tensor) -> tuple[int, int]:
        """Number of partial sums of squares after the attention and after the MLP: tiles of the GEMM along N."""
        m, n = tokens.shape
        configs = (select_tiles(weight, m, tokens.device, residual=True) for weight in (block.proj, block.down))
        attention, mlp = (math.ceil(n / config.tile_n) for config in configs)
        return attention, mlp

    def _rstd_operands(
        self, state: QuackState, block: FoldedBlock, weight: GemmWeight, *, needs_bias: bool
    ) -> tuple[Epilogues, dict[str, Tensor]]:
        """Epilogues, and the operands of those that apply a norm."""
        # A GEMM that reads float8 also needs the rms that its input was scaled by.
        sum_sq = state.sum_sq_buffer if state.is_fp8 and weight.scale is not None else state.sum_sq
        epilogue = epilogues(state.tokens.shape[1], block.eps, self._num_parts(block, state.tokens))
        return epilogue, {"rstd": sum_sq, **self._column_operands(weight, needs_bias=needs_bias)}

    def _column_operands(self, weight: GemmWeight, *, needs_bias: bool = False) -> dict[str, Tensor]:
        """Scale and bias of a weight, those that it has; with `needs_bias`, zeros for a missing bias."""
        operands = {"scale": weight.scale, "bias": weight.bias}
        if needs_bias and weight.bias is None:
            n = len(weight.weight)
            if n not in self.zeros:
                self.zeros[n] = torch.zeros(n, dtype=torch.float32, device=weight.weight.device)
            operands["bias"] = self.zeros[n]
        return {name: vector for name, vector in operands.items() if vector is not None}


def run(
    epilogue: Any,
    x: Tensor,
    weight: GemmWeight,
    output: Tensor | None,
    operands: dict[str, Tensor],
    residual: Tensor | None = None,
    config: TileConfig | None = None,
) -> None:
    """Run `x @ weightᵀ` with an epilogue.

    Args:
        epilogue: one of `Epilogues`.
        x: `(M, K)`.
        weight: `(N, K)`.
        output: `(M, N)` output D, or `None` where the epilogue has other outputs only.
        operands: inputs and outputs of the epilogue, by name.
        residual: `(M, N)` input C, or `None`.
        config: tiles; `None` selects the fastest.
    """
    config = config or select_tiles(weight, len(x), x.device, residual=residual is not None)
    attributes: tuple[tuple[str, object], ...] = ()
    if x.dtype == FP8:  # accumulate in the tensor cores alone, as torch does with use_fast_accum
        attributes = (("fp8_slow_accum", False),)
    if config.epi_n != DEFAULT_EPI_N:
        attributes += (("_compute_tile_shape_or_override", EpilogueTile(config.epi_n)),)
    epilogue.gemm(
        x,
        weight.weight,
        output,
        residual,
        epi_args={name: operand[None] if operand.ndim == 1 else operand for name, operand in operands.items()},
        tile_M=config.tile_m,
        tile_N=config.tile_n,
        cluster_M=config.cluster_m,
        cluster_N=config.cluster_n,
        pingpong=True,  # two tiles in turn: one is multiplied while the other is written
        post_init_attrs=attributes,
    )


def select_tiles(weight: GemmWeight, m: int, device: torch.device, *, residual: bool) -> TileConfig:
    """The fastest tiles for a GEMM with `m` rows, see `nopad.inference.fusion.tile_config`."""
    n, k = weight.weight.shape
    return fastest(tile_configs(n, k, float8=weight.scale is not None, residual=residual), m, n, num_sms(device))


@lru_cache
def num_sms(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count

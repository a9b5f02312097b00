"""Custom epilogue operands for quack; importable only where quack is installed.

An epilogue tile of 64 rows is written by 128 threads. Within each group of eight columns, one thread of four holds two
neighbouring columns, of two rows that are eight apart. Where that assignment matters, data in memory is permuted to
match it: by `pack_cos_sin` for what is read, by `GATE_UP_PERMUTATION` for what is written.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cutlass  # pyright: ignore[reportMissingImports]
import torch
from cutlass import const_expr, cute  # pyright: ignore[reportMissingImports]
from quack import copy_utils  # pyright: ignore[reportMissingImports]
from quack.compile_utils import make_fake_tensor  # pyright: ignore[reportMissingImports]
from quack.cute_dsl_utils import torch2cute_dtype_map  # pyright: ignore[reportMissingImports]
from quack.epilogue.ops import ColVecLoad, ColVecReduce, TileStore  # pyright: ignore[reportMissingImports]
from quack.epilogue.rotary import RotaryCosSinLoadHost  # pyright: ignore[reportMissingImports]
from torch import Tensor

FILES = (Path(__file__), Path(__file__).with_name("quack_epilogues.py"))
SOURCE = hashlib.sha256(b"".join(file.read_bytes() for file in FILES)).hexdigest()
"""Part of every kernel's cache key: quack identifies code of installed packages by name only, and its cache outlives
versions of nopad."""
ROPE_COLUMNS = 32
"""Columns of an epilogue tile that `RopeLoad` loads for."""


def pack_cos_sin(cos: Tensor, sin: Tensor) -> Tensor:
    """Cosines and sines in the order in which the threads of `RopeLoad` read them: of 16 pairs, every fourth.

    Args:
        cos, sin: `(T, K / 2)`, K a multiple of `ROPE_COLUMNS`.

    Returns:
        `(T, K)` float16.
    """
    pairs = torch.stack((cos, sin), dim=2).half().unflatten(1, (-1, 4, 4))
    return pairs.transpose(2, 3).flatten(1)


class Rstd(ColVecLoad):
    """`scale / rms` of each row, from partial sums of the squares of its values.

    The operand is `QuackState.sum_sq` or `sum_sq_buffer`, with one column of memory per partial sum. Each tile of a
    GEMM adds the partial sums itself, which takes less time than launching a kernel for it.

    Args:
        name: name of the epilogue's argument.
        hidden_size: D.
        eps: eps of the norm.
        scale: factor of the result.
        parts: range of the operand's columns to sum, all by default.
        prev_parts: range of columns with the sums of other rows, whose rms the result is multiplied by.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        eps: float,
        scale: float = 1.0,
        parts: tuple[int, int] | None = None,
        prev_parts: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(name)
        self.hidden_size, self.eps, self.scale = hidden_size, eps, scale
        self.parts, self.prev_parts = parts, prev_parts

    def config_key(self) -> tuple:
        """Everything that the kernel's code depends on."""
        return SOURCE, self.hidden_size, self.eps, self.scale, self.parts, self.prev_parts

    def host_arg_key(self, value: Any) -> tuple:
        """Dtype and number of partial sums."""
        return torch2cute_dtype_map[value.dtype], value.shape[1]

    def host_fake_arg(self, key: tuple, fctx: Any) -> Any:
        """`(T, num_parts)`."""
        dtype, num_parts = key
        return make_fake_tensor(dtype, (fctx.m, num_parts), leading_dim=0, divisibility=1)

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        """Each thread computes the factor of a row and writes it to shared memory, where `ColVecLoad` reads it."""
        first_row = ctx.tile_coord_mnkl[0] * ctx.tile_M
        num_rows = min(ctx.varlen_manager.len_m(ctx.batch_idx) - first_row, ctx.tile_M)
        for step in cutlass.range_constexpr(math.ceil(ctx.tile_M / ctx.num_epi_threads)):
            row = ctx.tidx + step * ctx.num_epi_threads
            if row < num_rows:
                smem_tensor[row] = self.row_factor(param, first_row + row)
        layout = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=(1, 0))
        thread_factors = ctx.partition_for_epilogue_fn(cute.make_tensor(smem_tensor.iterator, layout))
        subtile = cute.group_modes(thread_factors, 3, cute.rank(thread_factors))[None, None, None, 0]
        return [thread_factors, cute.make_rmem_tensor(subtile.layout, gemm.acc_dtype)]

    def row_factor(self, sum_sq: Any, row: Any) -> Any:
        """The factor of a row."""
        parts = self.parts if self.parts is not None else (0, sum_sq.shape[1])
        factor = cute.math.rsqrt(self._mean_sq(sum_sq, row, *parts), fastmath=True) * self.scale
        if self.prev_parts is not None:
            mean = self._mean_sq(sum_sq, row, *self.prev_parts)
            factor = factor * mean * cute.math.rsqrt(mean, fastmath=True)
        return factor

    def _mean_sq(self, sum_sq: Any, row: Any, start: int, end: int) -> Any:
        total = sum_sq[row, start]
        for part in range(start + 1, end):
            total = total + sum_sq[row, part]
        return total * (1.0 / self.hidden_size) + self.eps


class RopeLoad(RotaryCosSinLoadHost):
    """Cosine and sine for each pair of columns; 1 and 0 for the columns of values, which are not rotated.

    The operand is `(T, K)` float16 from `pack_cos_sin`, for the channels of one head. A thread loads what it needs of a
    row and 32 columns at once. quack's own operand of this kind copies whole tables through shared memory, for values
    too; that is no faster, needs tiles of whole heads, and cannot be used twice in one epilogue.
    """

    def config_key(self) -> tuple:
        """Everything that the kernel's code depends on."""
        return (SOURCE,)

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        """Position of the tile: its first row, the last row of the output, its first column within a head's 3 · K."""
        assert cute.size(ctx.epi_tile[1]) == ROPE_COLUMNS
        period = const_expr(3 * cute.size(param.shape[1]))
        positions = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        positions = cute.group_modes(positions, 3, cute.rank(positions))
        first_row = ctx.tile_coord_mnkl[0] * ctx.tile_M
        last_row = ctx.varlen_manager.len_m(ctx.batch_idx) - 1
        column = 0 if const_expr(ctx.tile_N % period == 0) else ctx.tile_coord_mnkl[1] * ctx.tile_N % period
        return param, positions, first_row, last_row, column

    @cute.jit
    def begin_loop(self, gemm, state, epi_coord):
        """The thread's values for 32 columns: for each eight columns, one pair in each of two rows."""
        param, positions, first_row, last_row, first_column = state
        head_dim = const_expr(cute.size(param.shape[1]))
        thread_positions = positions[None, None, None, epi_coord]
        cos_sin = cute.make_rmem_tensor(thread_positions.shape, gemm.acc_dtype)
        for pair in cutlass.range_constexpr(cute.size(cos_sin) // 2):
            cos_sin[2 * pair], cos_sin[2 * pair + 1] = gemm.acc_dtype(1.0), gemm.acc_dtype(0.0)
        column = (first_column + ROPE_COLUMNS * epi_coord[1]) % (3 * head_dim)
        if column < 2 * head_dim:
            self.load_pairs(param, thread_positions, first_row, last_row, column % head_dim, cos_sin)
        return cos_sin

    @cute.jit
    def load_pairs(self, param, thread_positions, first_row, last_row, column, cos_sin):
        """Load four pairs, eight values, of each of two rows."""
        for second in cutlass.range_constexpr(2):
            row = cutlass.min(first_row + thread_positions[2 * second][0], last_row)
            source = cute.local_tile(param, (1, 8), (row, column // 8 + thread_positions[0][1] % 8 // 2))[0, None]
            values = cute.make_rmem_tensor(8, param.element_type)
            cute.copy(copy_utils.get_copy_atom(param.element_type, 8), source, values)
            for pair in cutlass.range_constexpr(4):
                for index in cutlass.range_constexpr(2):
                    cos_sin[4 * pair + 2 * second + index] = values[2 * pair + index].to(cos_sin.element_type)


@dataclass(frozen=True)
class EpilogueTile:
    """Width of the epilogue tile, in place of the method by which quack selects it."""

    epi_n: int

    def __call__(self, tile: tuple[int, int, int], *_: Any) -> tuple[int, int]:
        """Rows and columns of the epilogue tile."""
        return math.gcd(64, tile[0]), math.gcd(self.epi_n, tile[1])


class RowSumSq(ColVecReduce):
    """Partial sums over the columns of each tile, one column of memory per tile, as `Rstd` reads them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, scaled=True)

    def config_key(self) -> tuple:
        """Everything that the kernel's code depends on."""
        return SOURCE, *super().config_key()

    def host_fake_arg(self, key: tuple, fctx: Any) -> Any:
        """`(T, num_parts)`, or with a batch dimension before it."""
        dtype, ndim = key
        shape = (fctx.l, fctx.m, cute.sym_int()) if ndim == 3 else (fctx.m, cute.sym_int())
        return make_fake_tensor(dtype, shape, leading_dim=ndim - 2, divisibility=1)


GATE_UP_PERMUTATION = [0, 2, 4, 6, 1, 3, 5, 7]
"""Order of each eight pairs of gate and up, in which `GatedStore` writes their results in sequence."""


class GatedStore(TileStore):
    """Results of pairs of columns, half as many columns of 16 or 8 bits.

    Of each 16 columns, thread t of four holds pairs t and 4 + t, but has to write two neighbouring results. quack
    exchanges results between threads for that, which in float8 takes a quarter of all instructions. With weights in the
    order of `GATE_UP_PERMUTATION`, the thread holds results 2t and 2t + 1.
    """

    def to_params(self, gemm: Any, args: Any) -> Any:
        """As for an output that is not gated: for gated 8-bit outputs, quack asserts another device."""
        self.gated = False
        try:
            return super().to_params(gemm, args)
        finally:
            self.gated = True

    @cute.jit
    def store_convert(self, gemm, values, sr_seed, tidx, tile_coord_mnkl, num_prev_subtiles, epi_idx):
        """Reorder the thread's values from two rows per eight columns to two columns per row, as they are written."""
        for group in cutlass.range_constexpr(cute.size(values.shape) // 4):
            second, third = values[4 * group + 1], values[4 * group + 2]
            values[4 * group + 1], values[4 * group + 2] = third, second
        return values.to(getattr(gemm, self._dtype_gemm_attr()))

    @cute.jit
    def store_r2s(self, gemm, tiled_copy, frag_out, tRS_s_stage, tidx):
        """Copy to shared memory from the rounded registers; quack would unpack 8-bit values one by one first."""
        cute.copy(tiled_copy, tiled_copy.retile(frag_out), tRS_s_stage)

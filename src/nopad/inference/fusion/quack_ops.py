"""Operands and results of quack's epilogues that quack does not have: importable only where quack is.

Columns of a product are written some at a time, of 64 rows, by 128 threads: a thread of four has two neighbours of each
eight columns, and of two rows eight apart. Where it matters which thread has what, an order of memory says so: `laid`
for what is read, `PLACES` for what is written.
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
"""In the key of every kernel: of installed code quack looks at names alone, and it keeps kernels across versions."""
COLUMNS = 32
"""That `Angles` reads for at a time."""


def laid(cos: Tensor, sin: Tensor) -> Tensor:
    """Numbers of pairs as `Angles` reads them: of 16 pairs a thread has every fourth.

    Args:
        cos, sin: `(T, K / 2)`, K a multiple of `COLUMNS`.

    Returns:
        `(T, K)` float16.
    """
    pairs = torch.stack((cos, sin), dim=2).half().unflatten(1, (-1, 4, 4))
    return pairs.transpose(2, 3).flatten(1)


class Rstd(ColVecLoad):
    """`scale / rms` of each row, from the squares of its `width` numbers added up in parts.

    Its operand is `squares` of a `gemm_reference.Stream`, each part a column of memory. Each tile of a
    product adds the parts up itself, which takes less than a kernel that does it once would take to start.

    Args:
        name: of the epilogue's argument.
        width: D.
        eps: of the norm.
        scale: of the result.
        own: first of the operand's parts that count and first that does not, all unless given.
        before: the same of the parts of other rows, whose `rms` the result is multiplied with.
    """

    def __init__(
        self,
        name: str,
        width: int,
        eps: float,
        scale: float = 1.0,
        own: tuple[int, int] | None = None,
        before: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(name)
        self.width, self.eps, self.scale, self.own, self.before = width, eps, scale, own, before

    def config_key(self) -> tuple:
        """All that the code of a kernel depends on."""
        return SOURCE, self.width, self.eps, self.scale, self.own, self.before

    def host_arg_key(self, value: Any) -> tuple:
        """Type and number of parts."""
        return torch2cute_dtype_map[value.dtype], value.shape[1]

    def host_fake_arg(self, key: tuple, fctx: Any) -> Any:
        """`(T, parts)`."""
        dtype, parts = key
        return make_fake_tensor(dtype, (fctx.m, parts), leading_dim=0, divisibility=1)

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        """Threads take a row each, and leave its number in shared memory, where `ColVecLoad` would copy it to."""
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        rows = min(ctx.varlen_manager.len_m(ctx.batch_idx) - first, ctx.tile_M)
        for turn in cutlass.range_constexpr(math.ceil(ctx.tile_M / ctx.num_epi_threads)):
            row = ctx.tidx + turn * ctx.num_epi_threads
            if row < rows:
                smem_tensor[row] = self.number(param, first + row)
        columns = cute.make_layout((ctx.tile_M, ctx.tile_N), stride=(1, 0))
        own = ctx.partition_for_epilogue_fn(cute.make_tensor(smem_tensor.iterator, columns))
        part = cute.group_modes(own, 3, cute.rank(own))[None, None, None, 0]
        return [own, cute.make_rmem_tensor(part.layout, gemm.acc_dtype)]

    def number(self, squares: Any, row: Any) -> Any:
        """What a row is multiplied with."""
        own = self.own if self.own is not None else (0, squares.shape[1])
        result = cute.math.rsqrt(self._mean(squares, row, *own), fastmath=True) * self.scale
        if self.before is not None:
            mean = self._mean(squares, row, *self.before)
            result = result * mean * cute.math.rsqrt(mean, fastmath=True)
        return result

    def _mean(self, squares: Any, row: Any, first: int, last: int) -> Any:
        total = squares[row, first]
        for part in range(first + 1, last):
            total = total + squares[row, part]
        return total * (1.0 / self.width) + self.eps


class Angles(RotaryCosSinLoadHost):
    """Cosine and sine of each pair of columns, 1 and 0 where they belong to values, which are not turned.

    Its operand is `(T, K)` in 16 bits, laid by `laid`: the numbers of one head. A thread reads what it needs of a row
    and 32 columns in one piece. What quack has of this kind copies whole tables through shared memory, for values too;
    that is no faster, needs tiles that hold whole heads, and cannot be had twice.
    """

    def config_key(self) -> tuple:
        """All that the code of a kernel depends on."""
        return (SOURCE,)

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        """Where a tile lies: its first row, the last row there is, its first column within a head's 3 · K."""
        assert cute.size(ctx.epi_tile[1]) == COLUMNS
        period = const_expr(3 * cute.size(param.shape[1]))
        places = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        places = cute.group_modes(places, 3, cute.rank(places))
        first = ctx.tile_coord_mnkl[0] * ctx.tile_M
        last = ctx.varlen_manager.len_m(ctx.batch_idx) - 1
        column = 0 if const_expr(ctx.tile_N % period == 0) else ctx.tile_coord_mnkl[1] * ctx.tile_N % period
        return param, places, first, last, column

    @cute.jit
    def begin_loop(self, gemm, state, epi_coord):
        """The numbers of 32 columns, those of a thread: for each eight columns a pair of two rows."""
        param, places, first, last, start = state
        size = const_expr(cute.size(param.shape[1]))
        mine = places[None, None, None, epi_coord]
        found = cute.make_rmem_tensor(mine.shape, gemm.acc_dtype)
        for pair in cutlass.range_constexpr(cute.size(found) // 2):
            found[2 * pair], found[2 * pair + 1] = gemm.acc_dtype(1.0), gemm.acc_dtype(0.0)
        column = (start + COLUMNS * epi_coord[1]) % (3 * size)
        if column < 2 * size:
            self.read(param, mine, first, last, column % size, found)
        return found

    @cute.jit
    def read(self, param, mine, first, last, column, found):
        """Eight numbers of each of two rows, those of four pairs."""
        for second in cutlass.range_constexpr(2):
            row = cutlass.min(first + mine[2 * second][0], last)
            part = cute.local_tile(param, (1, 8), (row, column // 8 + mine[0][1] % 8 // 2))[0, None]
            numbers = cute.make_rmem_tensor(8, param.element_type)
            cute.copy(copy_utils.get_copy_atom(param.element_type, 8), part, numbers)
            for pair in cutlass.range_constexpr(4):
                for number in cutlass.range_constexpr(2):
                    found[4 * pair + 2 * second + number] = numbers[2 * pair + number].to(found.element_type)


@dataclass(frozen=True)
class Written:
    """How many columns of a tile are written at a time, in place of quack's own choice."""

    columns: int

    def __call__(self, tile: tuple[int, int, int], *_: Any) -> tuple[int, int]:
        """Rows and columns, in place of a method of quack's."""
        return math.gcd(64, tile[0]), math.gcd(self.columns, tile[1])


class Squares(ColVecReduce):
    """Sums over the columns of a tile, each tile's a column of memory, as `Rstd` reads them."""

    def __init__(self, name: str) -> None:
        super().__init__(name, scaled=True)

    def config_key(self) -> tuple:
        """All that the code of a kernel depends on."""
        return SOURCE, *super().config_key()

    def host_fake_arg(self, key: tuple, fctx: Any) -> Any:
        """`(T, parts)`, or with a batch's number before it."""
        dtype, ndim = key
        shape = (fctx.l, fctx.m, cute.sym_int()) if ndim == 3 else (fctx.m, cute.sym_int())
        return make_fake_tensor(dtype, shape, leading_dim=ndim - 2, divisibility=1)


PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight results each of eight pairs of columns holds, as `GatedStore` writes them."""


class GatedStore(TileStore):
    """Results of pairs of columns, half as many columns of 16 or 8 bits.

    Of 16 columns a thread of four has the pairs t and 4 + t, and has to write two neighbours. quack moves results
    between threads for that, which in float8 takes a quarter of all instructions. Weights laid in the order of `PLACES`
    give a thread the results 2t and 2t + 1.
    """

    def to_params(self, gemm: Any, args: Any) -> Any:
        """As it is for columns that are not gated: for those of 8 bits quack asserts that the device is another."""
        self.gated = False
        try:
            return super().to_params(gemm, args)
        finally:
            self.gated = True

    @cute.jit
    def store_convert(self, gemm, values, sr_seed, tidx, tile_coord_mnkl, num_prev_subtiles, epi_idx):
        """A thread's values, for each eight columns those of two rows, as it writes them: for each row two columns."""
        for eight in cutlass.range_constexpr(cute.size(values.shape) // 4):
            second, third = values[4 * eight + 1], values[4 * eight + 2]
            values[4 * eight + 1], values[4 * eight + 2] = third, second
        return values.to(getattr(gemm, self._dtype_gemm_attr()))

    @cute.jit
    def store_r2s(self, gemm, tiled_copy, frag_out, tRS_s_stage, tidx):
        """From the registers that values were rounded into: quack takes those of 8 bits out one by one first."""
        cute.copy(tiled_copy, tiled_copy.retile(frag_out), tRS_s_stage)

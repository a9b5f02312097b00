"""What quack (github.com/Dao-AILab/quack) does to a product before it is written: importable only where quack is.

An epilogue is a function of one number of the product, `acc`. Its other arguments are `c`, the number of the residual
stream at the same place, and what it declares: one number for each row (`Rstd`) or for each column (`RowVecLoad`). In
the mode "acc_pair" each argument is a pair of neighbouring columns.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import cutlass  # pyright: ignore[reportMissingImports]
from cutlass import cute  # pyright: ignore[reportMissingImports]
from quack.activation import act_fn_map, relu, swiglu_tanh, tanh  # pyright: ignore[reportMissingImports]
from quack.compile_utils import make_fake_tensor  # pyright: ignore[reportMissingImports]
from quack.cute_dsl_utils import torch2cute_dtype_map  # pyright: ignore[reportMissingImports]
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # pyright: ignore[reportMissingImports]
from quack.epilogue.ops import (  # pyright: ignore[reportMissingImports]
    ColVecLoad,
    ColVecReduce,
    RowVecLoad,
    TileStore,
)
from quack.epilogue.rotary import rotary_cos_sin_load  # pyright: ignore[reportMissingImports]

from nopad.inference.products import SMALL

SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""In the key of every kernel: of installed code quack looks at names alone, and it keeps kernels across versions."""
BIAS, SCALE = RowVecLoad("bias"), RowVecLoad("scale")
ACTIVATIONS = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu"}


class Rstd(ColVecLoad):
    """`scale / rms` of each row, from the squares of its `width` numbers added up in parts.

    Its operand is `squares` of a `nopad.inference.products.Stream`, each part a column of memory. Each tile of a
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


class Epilogues:
    """What is done to the products of blocks whose rows are `width` wide and whose norms add `eps`.

    Args:
        width: D.
        eps: of the norms.
        parts: that squares behind the attention and behind the MLP are added up in. In float8 they stand side by side
            in one operand, since either's rows are scaled by the other's.
    """

    def __init__(self, width: int, eps: float, parts: tuple[int, int]) -> None:
        rstd = {"rstd": Rstd("rstd", width, eps)}
        biased = {**rstd, "bias": BIAS}
        self.normed = gemm_epilogue(ops=rstd)(normed)
        self.normed_biased = gemm_epilogue(ops=biased)(normed_biased)
        self.turned = gemm_epilogue(ops={**biased, "table": rotary_cos_sin_load("table")}, mode="acc_pair")(turned)
        pairs = {"outputs": (GatedStore("out", gated=True),), "mode": "acc_pair"}
        self.gated = gemm_epilogue(ops=rstd, **pairs)(gated)
        self.gated_biased = gemm_epilogue(ops=biased, **pairs)(gated_biased)
        self.activated = {name: gemm_epilogue(ops=biased)(activated(name)) for name in ("gelu", *ACTIVATIONS)}
        sums = {"reduces": {"squares": Squares("squares")}}
        self.added = gemm_epilogue(**sums)(added)
        self.added_biased = gemm_epilogue(ops={"bias": BIAS}, **sums)(added_biased)

        attention, mlp = (0, parts[0]), (parts[0], sum(parts))
        behind_attention = {"rstd": Rstd("rstd", width, eps, 1 / SMALL, attention, mlp), "scale": SCALE}
        behind_mlp = {"rstd": Rstd("rstd", width, eps, 1 / SMALL, mlp, attention), "scale": SCALE}
        self.normed_float8 = gemm_epilogue(ops=behind_mlp)(normed_float8)
        self.gated_float8 = gemm_epilogue(ops=behind_attention, **pairs)(gated_float8)
        shrink = {"shrink": Rstd("shrink", width, eps, SMALL)}
        small = {"outputs": ("small",), **sums}
        self.added_small = gemm_epilogue(ops=shrink, **small)(added_small)
        self.added_small_float8 = gemm_epilogue(ops={**shrink, "scale": SCALE}, **small)(added_small_float8)


@lru_cache
def epilogues(width: int, eps: float, parts: tuple[int, int]) -> Epilogues:
    """Made once, and with them the kernels of all layers."""
    return Epilogues(width, eps, parts)


def normed(acc, rstd):
    return {"D": acc * rstd}


def normed_biased(acc, rstd, bias):
    return {"D": acc * rstd + bias}


def normed_float8(acc, rstd, scale):
    return {"D": acc * rstd * scale}


def turned(acc, rstd, bias, table):
    first, second = unpack(acc * rstd + bias)
    cos, sin = unpack(table)
    return {"D": pack(first * cos - second * sin, second * cos + first * sin)}


# SwiGLU by a GPU's tanh, which is off by 2⁻¹¹: 2e-4 of a row at most, where rounding it to bfloat16 is off by 1.7e-3,
# and to float8 by 2.6e-2. An exponential and a division take twice as long.
def gated(acc, rstd):
    gate, up = unpack(acc * rstd)
    return {"out": swiglu_tanh(gate, up)}


def gated_biased(acc, rstd, bias):
    gate, up = unpack(acc * rstd + bias)
    return {"out": swiglu_tanh(gate, up)}


def gated_float8(acc, rstd, scale):
    gate, up = unpack(acc * rstd * scale)
    return {"out": swiglu_tanh(gate, up)}


def gelu(values):
    """GELU by the error function, `x · Φ(x)`, with `Φ(x) = (1 + tanh(x · p(x²))) / 2`.

    `p` is a fit to `atanh(erf(x / √2)) / x` that is off by 2.5e-5 of GELU at most; a GPU's tanh is off by 2⁻¹¹ of its
    result. Either is below what bfloat16 keeps of a row. The exact function takes longer than the product.
    """
    square = 60.0 - relu(60.0 - values * values)  # beyond, tanh is 1, and the fit would fall again
    slope = (square * -0.0003515156507738412 + 0.03700563683002939) * square + 0.7975078959319165
    half = values * 0.5
    return half * tanh(values * slope) + half


def activated(activation: str) -> Any:
    """An epilogue that applies an activation."""
    act = gelu if activation == "gelu" else act_fn_map[ACTIVATIONS[activation]]

    def activated_biased(acc, rstd, bias):
        return {"D": act(acc * rstd + bias)}

    activated_biased.__qualname__ = f"activated_biased_{activation}"  # which quack tells installed functions by
    return activated_biased


def added(acc, c):
    total = acc + c
    return {"D": total, "squares": (total, total)}


def added_biased(acc, c, bias):
    total = acc + bias + c
    return {"D": total, "squares": (total, total)}


def added_small(acc, c, shrink):
    total = acc + c
    return {"D": total, "small": total * shrink, "squares": (total, total)}


def added_small_float8(acc, c, shrink, scale):
    total = acc * scale + c
    return {"D": total, "small": total * shrink, "squares": (total, total)}

"""What quack (github.com/Dao-AILab/quack) does to a product before it is written: importable only where quack is.

An epilogue is a function of one number of the product, `acc`. Its other arguments are `c`, the number of the residual
stream at the same place, and what it declares: one number for each row (`Rstd`), for each column (`RowVecLoad`), or for
each place (`Angles`). In the mode "acc_pair" each argument is a pair of neighbouring columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cutlass import cute  # pyright: ignore[reportMissingImports]
from quack.activation import act_fn_map, swiglu_tanh, tanh  # pyright: ignore[reportMissingImports]
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # pyright: ignore[reportMissingImports]
from quack.epilogue.ops import RowVecLoad  # pyright: ignore[reportMissingImports]

from nopad.inference.fusion.gemm_reference import SMALL
from nopad.inference.fusion.quack_ops import Angles, GatedStore, Rstd, Squares

BIAS, SCALE = RowVecLoad("bias"), RowVecLoad("scale")
ACTIVATIONS = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu"}


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
        self.turned = gemm_epilogue(ops={**biased, "table": Angles("table")}, mode="acc_pair")(turned)
        both = {**biased, "table": Angles("table"), "other": Angles("other")}
        self.turned_apart = gemm_epilogue(ops=both, mode="acc_pair")(turned_apart)
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


def turned_apart(acc, rstd, bias, table, other):
    first, second = unpack(acc * rstd + bias)
    cos, sin = unpack(table)
    other_cos, other_sin = unpack(other)
    return {"D": pack(first * cos - second * sin, second * other_cos + first * other_sin)}


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
    square = cute.arch.fmin(values * values, 60.0)  # beyond, tanh is 1, and the fit would fall again
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

"""What quack (github.com/Dao-AILab/quack) does to a product before it is written: importable only where quack is.

An epilogue is a function of one number of the product, `acc`. Its other arguments are `c`, the number of the residual
stream at the same place, and what it declares: one number for each row (`ColVecLoad`, a column of them) or for each
column (`RowVecLoad`). In the mode "acc_pair" each argument is a pair of neighbouring columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from quack.activation import act_fn_map, gate_fn_map, relu, tanh  # pyright: ignore[reportMissingImports]
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # pyright: ignore[reportMissingImports]
from quack.epilogue.ops import (  # pyright: ignore[reportMissingImports]
    ColVecLoad,
    ColVecReduce,
    RowVecLoad,
    TileStore,
)
from quack.epilogue.rotary import rotary_cos_sin_load  # pyright: ignore[reportMissingImports]

FACTOR, BIAS, SCALE = ColVecLoad("factor"), RowVecLoad("bias"), RowVecLoad("scale")
SHRINK, SQUARES = ColVecLoad("shrink"), ColVecReduce("squares", scaled=True)
ACTIVATIONS = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu"}
swiglu = gate_fn_map["swiglu"]


class SmallGatedStore(TileStore):
    """Half as many columns of 8 bits, which quack asserts away on Hopper.

    Its code for them puts a thread's values in the right order there, too: a test compares every value.
    """

    def to_params(self, gemm: Any, args: Any) -> Any:
        """As it is for columns that are not gated, where nothing is asserted."""
        self.gated = False
        try:
            return super().to_params(gemm, args)
        finally:
            self.gated = True


@gemm_epilogue(ops={"factor": FACTOR})
def normed(acc, factor):
    return {"D": acc * factor}


@gemm_epilogue(ops={"factor": FACTOR, "bias": BIAS})
def normed_biased(acc, factor, bias):
    return {"D": acc * factor + bias}


@gemm_epilogue(ops={"factor": FACTOR, "scale": SCALE})
def normed_float8(acc, factor, scale):
    return {"D": acc * factor * scale}


@gemm_epilogue(ops={"factor": FACTOR, "bias": BIAS, "table": rotary_cos_sin_load("table")}, mode="acc_pair")
def turned(acc, factor, bias, table):
    first, second = unpack(acc * factor + bias)
    cos, sin = unpack(table)
    return {"D": pack(first * cos - second * sin, second * cos + first * sin)}


@gemm_epilogue(outputs=("out",), ops={"factor": FACTOR}, mode="acc_pair")
def gated(acc, factor):
    gate, up = unpack(acc * factor)
    return {"out": swiglu(gate, up)}


@gemm_epilogue(outputs=("out",), ops={"factor": FACTOR, "bias": BIAS}, mode="acc_pair")
def gated_biased(acc, factor, bias):
    gate, up = unpack(acc * factor + bias)
    return {"out": swiglu(gate, up)}


@gemm_epilogue(outputs=(SmallGatedStore("out", gated=True),), ops={"factor": FACTOR, "scale": SCALE}, mode="acc_pair")
def gated_float8(acc, factor, scale):
    gate, up = unpack(acc * factor * scale)
    return {"out": swiglu(gate, up)}


def gelu(values):
    """GELU by the error function, `x · Φ(x)`, with `Φ(x) = (1 + tanh(x · p(x²))) / 2`.

    `p` is a fit to `atanh(erf(x / √2)) / x` that is off by 2.5e-5 of GELU at most; a GPU's tanh is off by 2⁻¹¹ of its
    result. Either is below what bfloat16 keeps of a row. The exact function takes longer than the product.
    """
    square = 60.0 - relu(60.0 - values * values)  # beyond, tanh is 1, and the fit would fall again
    slope = (square * -0.0003515156507738412 + 0.03700563683002939) * square + 0.7975078959319165
    half = values * 0.5
    return half * tanh(values * slope) + half


@lru_cache
def activated(activation: str) -> Any:
    """An epilogue that applies an activation."""
    act = gelu if activation == "gelu" else act_fn_map[ACTIVATIONS[activation]]

    @gemm_epilogue(ops={"factor": FACTOR, "bias": BIAS})
    def activated_biased(acc, factor, bias):
        return {"D": act(acc * factor + bias)}

    return activated_biased


@gemm_epilogue(reduces={"squares": SQUARES})
def added(acc, c):
    total = acc + c
    return {"D": total, "squares": (total, total)}


@gemm_epilogue(ops={"bias": BIAS}, reduces={"squares": SQUARES})
def added_biased(acc, c, bias):
    total = acc + bias + c
    return {"D": total, "squares": (total, total)}


@gemm_epilogue(outputs=("small",), ops={"shrink": SHRINK}, reduces={"squares": SQUARES})
def added_small(acc, c, shrink):
    total = acc + c
    return {"D": total, "small": total * shrink, "squares": (total, total)}


@gemm_epilogue(outputs=("small",), ops={"shrink": SHRINK, "scale": SCALE}, reduces={"squares": SQUARES})
def added_small_float8(acc, c, shrink, scale):
    total = acc * scale + c
    return {"D": total, "small": total * shrink, "squares": (total, total)}

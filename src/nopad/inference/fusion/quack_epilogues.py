"""Epilogues of quack's GEMMs (github.com/Dao-AILab/quack); importable only where quack is installed.

An epilogue is a function of one accumulator value, `acc`. Its other arguments are `c`, the value of the residual stream
at the same position, and those of its operands: one value per row (`Rstd`), per column (`RowVecLoad`) or per position
(`RopeLoad`). In the mode "acc_pair", each argument is a pair of neighbouring columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cutlass import cute  # pyright: ignore[reportMissingImports]
from quack.activation import act_fn_map, swiglu_tanh, tanh  # pyright: ignore[reportMissingImports]
from quack.epilogue.frontend import gemm_epilogue, pack, unpack  # pyright: ignore[reportMissingImports]
from quack.epilogue.ops import RowVecLoad  # pyright: ignore[reportMissingImports]

from nopad.inference.fusion.gemm import FP8_ROW_RMS
from nopad.inference.fusion.quack_ops import GatedStore, RopeLoad, RowSumSq, Rstd

BIAS, SCALE = RowVecLoad("bias"), RowVecLoad("scale")
ACTIVATIONS = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu"}


class Epilogues:
    """Epilogues of blocks with rows of `hidden_size` and norms with `eps`.

    Args:
        hidden_size: D.
        eps: eps of the norms.
        num_parts: number of partial sums of squares after the attention and after the MLP. In float8 both lie side by
            side in one operand, since the rows of one are scaled by the rms of the other.
    """

    def __init__(self, hidden_size: int, eps: float, num_parts: tuple[int, int]) -> None:
        rstd = {"rstd": Rstd("rstd", hidden_size, eps)}
        rstd_bias = {**rstd, "bias": BIAS}
        self.rstd = gemm_epilogue(ops=rstd)(rstd_epi)
        self.rstd_bias = gemm_epilogue(ops=rstd_bias)(rstd_bias_epi)
        rope = {**rstd_bias, "rope": RopeLoad("rope")}
        self.rope = gemm_epilogue(ops=rope, mode="acc_pair")(rope_epi)
        two_angles = {**rope, "rope1": RopeLoad("rope1")}
        self.rope_two_angles = gemm_epilogue(ops=two_angles, mode="acc_pair")(rope_two_angles_epi)
        gated = {"outputs": (GatedStore("out", gated=True),), "mode": "acc_pair"}
        self.swiglu = gemm_epilogue(ops=rstd, **gated)(norm_swiglu_epi)
        self.swiglu_bias = gemm_epilogue(ops=rstd_bias, **gated)(norm_swiglu_bias_epi)
        self.activations = {name: gemm_epilogue(ops=rstd_bias)(activation_epi(name)) for name in ("gelu", *ACTIVATIONS)}
        sum_sq = {"reduces": {"sum_sq": RowSumSq("sum_sq")}}
        self.residual = gemm_epilogue(**sum_sq)(residual_sq_epi)
        self.residual_bias = gemm_epilogue(ops={"bias": BIAS}, **sum_sq)(residual_sq_bias_epi)

        attention, mlp = (0, num_parts[0]), (num_parts[0], sum(num_parts))
        after_attention = {"rstd": Rstd("rstd", hidden_size, eps, 1 / FP8_ROW_RMS, attention, mlp), "scale": SCALE}
        after_mlp = {"rstd": Rstd("rstd", hidden_size, eps, 1 / FP8_ROW_RMS, mlp, attention), "scale": SCALE}
        self.rstd_fp8 = gemm_epilogue(ops=after_mlp)(rstd_fp8_epi)
        self.swiglu_fp8 = gemm_epilogue(ops=after_attention, **gated)(norm_swiglu_fp8_epi)
        fp8_rstd = {"fp8_rstd": Rstd("fp8_rstd", hidden_size, eps, FP8_ROW_RMS)}
        fp8 = {"outputs": ("fp8",), **sum_sq}
        self.residual_fp8_out = gemm_epilogue(ops=fp8_rstd, **fp8)(residual_sq_fp8_out_epi)
        self.residual_fp8_in_out = gemm_epilogue(ops={**fp8_rstd, "scale": SCALE}, **fp8)(residual_sq_fp8_in_out_epi)


@lru_cache
def epilogues(hidden_size: int, eps: float, num_parts: tuple[int, int]) -> Epilogues:
    """Cached, so that all layers share their kernels."""
    return Epilogues(hidden_size, eps, num_parts)


def rstd_epi(acc, rstd):
    return {"D": acc * rstd}


def rstd_bias_epi(acc, rstd, bias):
    return {"D": acc * rstd + bias}


def rstd_fp8_epi(acc, rstd, scale):
    return {"D": acc * rstd * scale}


def rope_epi(acc, rstd, bias, rope):
    x0, x1 = unpack(acc * rstd + bias)
    cos, sin = unpack(rope)
    return {"D": pack(x0 * cos - x1 * sin, x1 * cos + x0 * sin)}


def rope_two_angles_epi(acc, rstd, bias, rope, rope1):
    x0, x1 = unpack(acc * rstd + bias)
    cos, sin = unpack(rope)
    cos1, sin1 = unpack(rope1)
    return {"D": pack(x0 * cos - x1 * sin, x1 * cos1 + x0 * sin1)}


# SwiGLU by the GPU's tanh instruction, whose error of 2⁻¹¹ is at most 2e-4 of a row. Rounding a row to bfloat16 has an
# error of 1.7e-3, and to float8 of 2.6e-2. An exponential and a division take twice as long.
def norm_swiglu_epi(acc, rstd):
    gate, up = unpack(acc * rstd)
    return {"out": swiglu_tanh(gate, up)}


def norm_swiglu_bias_epi(acc, rstd, bias):
    gate, up = unpack(acc * rstd + bias)
    return {"out": swiglu_tanh(gate, up)}


def norm_swiglu_fp8_epi(acc, rstd, scale):
    gate, up = unpack(acc * rstd * scale)
    return {"out": swiglu_tanh(gate, up)}


def gelu(x):
    """GELU by the error function, `x · Φ(x)`, with `Φ(x) = (1 + tanh(x · p(x²))) / 2`.

    `p` is a fit to `atanh(erf(x / √2)) / x` whose error is at most 2.5e-5 of GELU; the GPU's tanh instruction has a
    relative error of 2⁻¹¹. Both are below the rounding of a row to bfloat16. The exact function takes longer than the
    GEMM.
    """
    square = cute.arch.fmin(x * x, 60.0)  # beyond, tanh is 1, and the fit would decrease
    slope = (square * -0.0003515156507738412 + 0.03700563683002939) * square + 0.7975078959319165
    half = x * 0.5
    return half * tanh(x * slope) + half


def activation_epi(activation: str) -> Any:
    """Epilogue that applies an activation."""
    act = gelu if activation == "gelu" else act_fn_map[ACTIVATIONS[activation]]

    def activation_bias_epi(acc, rstd, bias):
        return {"D": act(acc * rstd + bias)}

    # quack identifies functions of installed packages by this name.
    activation_bias_epi.__qualname__ = f"activation_bias_epi_{activation}"
    return activation_bias_epi


def residual_sq_epi(acc, c):
    total = acc + c
    return {"D": total, "sum_sq": (total, total)}


def residual_sq_bias_epi(acc, c, bias):
    total = acc + bias + c
    return {"D": total, "sum_sq": (total, total)}


def residual_sq_fp8_out_epi(acc, c, fp8_rstd):
    total = acc + c
    return {"D": total, "fp8": total * fp8_rstd, "sum_sq": (total, total)}


def residual_sq_fp8_in_out_epi(acc, c, fp8_rstd, scale):
    total = acc * scale + c
    return {"D": total, "fp8": total * fp8_rstd, "sum_sq": (total, total)}

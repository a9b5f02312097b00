"""GEMMs and attention of one layer on a Hopper GPU: quack's tiles, cuBLAS, and the attention kernels.

    python benchmarks/gemms.py --rows 16896

The tiles in `nopad/inference/fusion/tile_config.py` were selected by these figures. Random numbers; each GEMM is
recorded 20 times in a CUDA graph, graphs are interleaved with one of GEMMs of 8,192³, and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nopad.bench.timing import interleave, timer
from nopad.bench.workloads import mixed
from nopad.inference.fusion.folding import GemmWeight
from nopad.inference.fusion.gemm_quack import run
from nopad.inference.fusion.quack_epilogues import epilogues
from nopad.inference.fusion.quack_ops import pack_cos_sin
from nopad.inference.fusion.tile_config import TileConfig
from nopad.kernels.attention import available_backends, varlen_attention
from nopad.kernels.gemm_formats import FP8
from nopad.kernels.triton_pointwise import silu_mul
from nopad.kernels.triton_swiglu import swiglu_gemm
from nopad.pipeline.packer import best_fit
from nopad.segments import Segments

BF16 = torch.bfloat16
CLUSTERS = ((2, 1), (1, 2), (2, 2))
CONFIGS = tuple(
    TileConfig(128, tile_n, cluster_m=m, cluster_n=n) for tile_n in (128, 160, 192, 208) for m, n in CLUSTERS
)
GEMMS = {
    "qkv": "rstd",
    "qkv with biases": "rstd_bias",
    "qkv with rope": "rope",
    "qkv with rope of two angles a pair": "rope_two_angles",
    "gate and up": "swiglu",
    "up, GELU": "gelu",
    "up, GELU by tanh": "gelu_tanh",
    "out": "residual",
    "down": "residual",
    "qkv in float8": "rstd_fp8",
    "gate and up in float8": "swiglu_fp8",
    "out, cast to float8": "residual_fp8_out",
    "down in float8": "residual_fp8_in_out",
}
"""Epilogue of each GEMM, an attribute of `Epilogues` or one of its activations."""
OPERANDS = {
    "rstd": ["rstd"],
    "rstd_bias": ["rstd", "bias"],
    "rope": ["rstd", "bias"],
    "rope_two_angles": ["rstd", "bias"],
    "swiglu": ["rstd"],
    "gelu": ["rstd", "bias"],
    "gelu_tanh": ["rstd", "bias"],
    "residual": [],
    "rstd_fp8": ["rstd", "scale"],
    "swiglu_fp8": ["rstd", "scale"],
    "residual_fp8_out": ["fp8_rstd"],
    "residual_fp8_in_out": ["fp8_rstd", "scale"],
}
"""Operands of each epilogue that are one value per row or column."""
FP8_INPUTS = ("rstd_fp8", "swiglu_fp8", "residual_fp8_in_out")
HEAD_DIM = 64
"""Head size of GEMMs with rope."""
NUM_PARTS = 8
"""Partial sums of squares of a row."""


RUNS, TIMES, SIDE = 7, 20, 8192


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16896, help="tokens of a pack (default: 16896)")
    parser.add_argument("--width", type=int, default=1024, help="of the residual stream (default: 1024, AIMv2-L's)")
    parser.add_argument("--inner", type=int, default=2816, help="of the MLP (default: 2816)")
    parser.add_argument("--only", default="", help="names that begin so (default: all, and attention)")
    options = parser.parse_args()
    for name, epilogue in GEMMS.items():
        if name.startswith(options.only):
            n, k = size_of(name, options.width, options.inner)
            sizes = options.rows, n, k
            configs = [config for config in CONFIGS if supports(epilogue, config)]
            configs += [
                replace(config, epi_n=64) for config in configs if config.tile_n % 64 == 0 and "rope" not in name
            ]
            jobs: dict[str, Callable[[], object]] = {}
            jobs |= {describe(config): quack_gemm(epilogue, *sizes, config) for config in configs}
            jobs["cuBLAS alone"] = cublas(*sizes)
            if epilogue == "swiglu":
                jobs |= {"cuBLAS and a kernel for the gate": two_passes(*sizes), "Triton": triton_swiglu(*sizes)}
            measure(name, jobs, 2 * options.rows * n * k)
    if "attention".startswith(options.only):
        for heads, size in ((8, 128), (16, 64), (16, 72)):
            attention(options.rows, heads, size)


def size_of(name: str, width: int, inner: int) -> tuple[int, int]:
    """N and K of a GEMM; one with GELU has an N of four times the width."""
    sizes = {"qkv": (3 * width, width), "gate": (2 * inner, width), "up": (4 * width, width)}
    sizes |= {"out": (width, width), "down": (width, inner)}
    return next(size for part, size in sizes.items() if name.startswith(part))


def describe(config: TileConfig) -> str:
    """One line of the table."""
    cluster = f"clusters of {config.cluster_m} × {config.cluster_n}"
    return f"{config.tile_m} × {config.tile_n} in {cluster}, epilogue tiles of {config.epi_n} columns"


def measure(name: str, jobs: dict[str, Callable[[], object]], work: int) -> None:
    """Time jobs interleaved with the peak and print a line for each, fastest first."""
    matrix = draw(SIDE, SIDE)
    graphs = [recorded(lambda: torch.mm(matrix, matrix), 5), *(recorded(job, TIMES) for job in jobs.values())]
    times = []
    for samples in interleave(timer(matrix.device), [graph.replay for graph in graphs], range(RUNS)):
        assert isinstance(samples, list)
        times.append(statistics.median(sample.seconds for sample in samples))
    peak = 5 * 2 * SIDE**3 / times[0]
    print(f"{name}; measured peak {peak / 1e12:.0f} TFLOP/s")
    for seconds, job in sorted(zip((time / TIMES for time in times[1:]), jobs, strict=True)):
        rate = work / seconds
        print(f"  {seconds * 1e6:6.1f} µs, {rate / 1e12:5.0f} TFLOP/s, {rate / peak:.3f} of peak: {job}")


def recorded(job: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `times` launches in sequence."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first launch compiles
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            job()
    return graph


def supports(epilogue: str, config: TileConfig) -> bool:
    """Whether quack can write such tiles: pairs of columns need a multiple of 32."""
    return not epilogue.startswith(("swiglu", "rope")) or config.tile_n % 32 == 0


def quack_gemm(epilogue: str, m: int, n: int, k: int, config: TileConfig) -> Callable[[], None]:
    """One GEMM with its epilogue, on random numbers."""
    x, weight = (draw(rows, k).to(FP8 if epilogue in FP8_INPUTS else BF16) for rows in (m, n))
    output: Tensor | None = draw(m, n)
    residual = draw(m, n) if epilogue.startswith("residual") else None
    shapes = {"scale": (n,), "bias": (n,)}
    operands = {name: torch.rand(shapes.get(name, (NUM_PARTS, m)), device="cuda") for name in OPERANDS[epilogue]}
    operands |= {name: operand.T for name, operand in operands.items() if operand.ndim == 2}
    if epilogue.startswith("rope"):
        operands["rope"] = pack_cos_sin(*torch.randn(2, m, HEAD_DIM // 2, device="cuda"))
        if epilogue == "rope_two_angles":
            operands["rope1"] = operands["rope"]
    if epilogue.startswith("swiglu"):
        operands["out"], output = draw(m, n // 2).to(x.dtype), None
    if residual is not None:
        operands["sum_sq"] = torch.empty(-(-n // config.tile_n), m, device="cuda").T
        if "fp8" in epilogue:
            operands["fp8"] = draw(m, n).to(FP8)
    library = epilogues(k, 1e-5, (NUM_PARTS // 2, NUM_PARTS // 2))
    selected = library.activations[epilogue] if epilogue.startswith("gelu") else getattr(library, epilogue)
    gemm_weight = GemmWeight(weight)

    def multiply() -> None:
        run(selected, x, gemm_weight, output, operands, residual, config)

    return multiply


def cublas(m: int, n: int, k: int) -> Callable[[], Tensor]:
    """The GEMM without an epilogue, in bfloat16."""
    x, weight, output = draw(m, k), draw(n, k), draw(m, n)
    return lambda: torch.mm(x, weight.T, out=output)


def two_passes(m: int, n: int, k: int) -> Callable[[], Tensor]:
    """A GEMM that writes gates and ups, and a kernel that reads and multiplies them."""
    x, weight = draw(m, k), draw(n, k)
    return lambda: silu_mul(torch.mm(x, weight.T))


def triton_swiglu(m: int, n: int, k: int) -> Callable[[], Tensor]:
    """SwiGLU in the epilogue of a Triton GEMM, which runs where quack is not installed."""
    x, weight = draw(m, k), draw(n, k)
    return lambda: swiglu_gemm(x, weight, None)


def attention(rows: int, heads: int, size: int) -> None:
    """All attention kernels on a pack of the workload "mixed"."""
    workload = mixed(256, seed=0)
    lengths = [workload.lengths[number] for number in best_fit(workload.lengths, rows)[1]]
    segments = Segments.of([*lengths, *([rows - sum(lengths)] if sum(lengths) < rows else [])], "cuda")
    query, key, value = draw(rows, heads, 3 * size).unflatten(2, (3, size)).unbind(2)
    kernels = [name for name in available_backends("cuda", BF16, size) if name not in ("sdpa", "eager")]
    jobs: dict[str, Any] = {
        name: lambda name=name: varlen_attention(query, key, value, segments, backend=name) for name in kernels
    }
    work = 4 * heads * size * sum(length**2 for length in segments.lengths)
    measure(f"attention, {heads} heads of {size}", jobs, work)


def draw(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, device="cuda").to(BF16)


if __name__ == "__main__":
    main()

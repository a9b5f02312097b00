"""Products and attention of one layer on a Hopper GPU: tiles of quack's, cuBLAS beside them, kernels of attention.

    python benchmarks/products.py --rows 16896

The tiles in `nopad/inference/tiles.py` were chosen by these figures. Random numbers; each is recorded 20 times
in a CUDA graph, graphs are interleaved with one of GEMMs of 8,192³, and medians are printed.
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
from nopad.inference.float8 import FLOAT8
from nopad.inference.fusion.folding import Matrix
from nopad.inference.fusion.gemm_quack import run
from nopad.inference.fusion.quack_epilogues import epilogues
from nopad.inference.fusion.quack_ops import laid
from nopad.inference.fusion.tile_config import Tiles
from nopad.inference.fusion.triton_gated import gated
from nopad.inference.triton_kernels import silu_mul
from nopad.kernels.attention import available_backends, varlen_attention
from nopad.pipeline.packer import best_fit
from nopad.segments import Segments

BF16 = torch.bfloat16
CLUSTERS = ((2, 1), (1, 2), (2, 2))
TILES = tuple(Tiles(128, columns, cluster=cluster) for columns in (128, 160, 192, 208) for cluster in CLUSTERS)
PRODUCTS = {
    "qkv": "normed",
    "qkv with biases": "normed_biased",
    "qkv turned": "turned",
    "qkv turned by two angles a pair": "turned_apart",
    "gate and up": "gated",
    "up, GELU": "gelu",
    "up, GELU by tanh": "gelu_tanh",
    "out": "added",
    "down": "added",
    "qkv in float8": "normed_float8",
    "gate and up in float8": "gated_float8",
    "out, cast to float8": "added_small",
    "down in float8": "added_small_float8",
}
"""The epilogue of a product."""
HEAD = 64
"""Size of heads that are turned."""
PARTS = 8
"""That the squares of a row were added up in."""


RUNS, TIMES, SIDE = 7, 20, 8192


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16896, help="tokens of a pack (default: 16896)")
    parser.add_argument("--width", type=int, default=1024, help="of the residual stream (default: 1024, AIMv2-L's)")
    parser.add_argument("--inner", type=int, default=2816, help="of the MLP (default: 2816)")
    parser.add_argument("--only", default="", help="names that begin so (default: all, and attention)")
    options = parser.parse_args()
    for name, epilogue in PRODUCTS.items():
        if name.startswith(options.only):
            columns, terms = size_of(name, options.width, options.inner)
            sizes = options.rows, columns, terms
            usable = [tiles for tiles in TILES if takes(epilogue, tiles)]
            usable += [
                replace(tiles, written=64) for tiles in usable if tiles.columns % 64 == 0 and "turned" not in name
            ]
            jobs: dict[str, Callable[[], object]] = {}
            jobs |= {str_of(tiles): product(epilogue, *sizes, tiles) for tiles in usable}
            jobs["cuBLAS alone"] = cublas(*sizes)
            if epilogue == "gated":
                jobs |= {"cuBLAS and a pass for the gate": two_passes(*sizes), "Triton": triton_gates(*sizes)}
            tell(name, jobs, 2 * options.rows * columns * terms)
    if "attention".startswith(options.only):
        for heads, size in ((8, 128), (16, 64), (16, 72)):
            attention(options.rows, heads, size)


def size_of(name: str, width: int, inner: int) -> tuple[int, int]:
    """Columns and terms of a product; one with GELU is four times as wide as the stream."""
    sizes = {"qkv": (3 * width, width), "gate": (2 * inner, width), "up": (4 * width, width)}
    sizes |= {"out": (width, width), "down": (width, inner)}
    return next(size for part, size in sizes.items() if name.startswith(part))


def str_of(tiles: Tiles) -> str:
    """For the table."""
    cluster = f"clusters of {tiles.cluster[0]} × {tiles.cluster[1]}"
    return f"{tiles.rows} × {tiles.columns} in {cluster}, {tiles.written} columns written at a time"


def tell(name: str, jobs: dict[str, Callable[[], object]], work: int) -> None:
    """Time jobs interleaved with the peak and print a line for each, fastest first."""
    matrix = draw(SIDE, SIDE)
    graphs = [recorded(lambda: torch.mm(matrix, matrix), 5), *(recorded(job, TIMES) for job in jobs.values())]
    times = []
    for samples in interleave(timer(matrix.device), [graph.replay for graph in graphs], RUNS):
        assert isinstance(samples, list)
        times.append(statistics.median(sample.seconds for sample in samples))
    peak = 5 * 2 * SIDE**3 / times[0]
    print(f"{name}; measured peak {peak / 1e12:.0f} TFLOP/s")
    for seconds, job in sorted(zip((time / TIMES for time in times[1:]), jobs, strict=True)):
        rate = work / seconds
        print(f"  {seconds * 1e6:6.1f} µs, {rate / 1e12:5.0f} TFLOP/s, {rate / peak:.3f} of peak: {job}")


def recorded(job: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """So many launches one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first compiles
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            job()
    return graph


def takes(epilogue: str, tiles: Tiles) -> bool:
    """Whether quack can write such tiles: pairs of columns by the 32."""
    return not epilogue.startswith(("gated", "turned")) or tiles.columns % 32 == 0


def product(epilogue: str, rows: int, columns: int, terms: int, tiles: Tiles) -> Callable[[], None]:
    """One product on random numbers."""
    small = "float8" in epilogue
    states, weight = (draw(number, terms).to(FLOAT8 if small else BF16) for number in (rows, columns))
    output: Tensor | None = draw(rows, columns)
    residual = draw(rows, columns) if epilogue.startswith("added") else None
    wanted = {
        "normed": ["rstd"],
        "normed_biased": ["rstd", "bias"],
        "turned": ["rstd", "bias"],
        "turned_apart": ["rstd", "bias"],
        "gated": ["rstd"],
        "gelu": ["rstd", "bias"],
        "gelu_tanh": ["rstd", "bias"],
        "added": [],
        "normed_float8": ["rstd", "scale"],
        "gated_float8": ["rstd", "scale"],
        "added_small": ["shrink"],
        "added_small_float8": ["shrink", "scale"],
    }[epilogue]
    shapes = {"scale": (columns,), "bias": (columns,)}
    operands = {name: torch.rand(shapes.get(name, (PARTS, rows)), device="cuda") for name in wanted}
    operands |= {name: operand.T for name, operand in operands.items() if operand.ndim == 2}
    if epilogue.startswith("turned"):
        operands["table"] = operands["other"] = laid(*torch.randn(2, rows, HEAD // 2, device="cuda"))
        if epilogue == "turned":
            del operands["other"]
    if epilogue.startswith("gated"):
        operands["out"], output = draw(rows, columns // 2).to(states.dtype), None
    if residual is not None:
        operands["squares"] = torch.empty(-(-columns // tiles.columns), rows, device="cuda").T
        if "small" in epilogue:
            operands["small"] = draw(rows, columns).to(FLOAT8)
    known = epilogues(terms, 1e-5, (PARTS // 2, PARTS // 2))
    chosen = known.activated[epilogue] if epilogue.startswith("gelu") else getattr(known, epilogue)
    matrix = Matrix(weight)

    def multiply() -> None:
        run(chosen, states, matrix, output, operands, residual, tiles)

    return multiply


def cublas(rows: int, columns: int, terms: int) -> Callable[[], Tensor]:
    """The bare product in bfloat16."""
    states, weight, output = draw(rows, terms), draw(columns, terms), draw(rows, columns)
    return lambda: torch.mm(states, weight.T, out=output)


def two_passes(rows: int, columns: int, terms: int) -> Callable[[], Tensor]:
    """Gates and ups written, read, and multiplied."""
    states, weight = draw(rows, terms), draw(columns, terms)
    return lambda: silu_mul(torch.mm(states, weight.T))


def triton_gates(rows: int, columns: int, terms: int) -> Callable[[], Tensor]:
    """Gates and ups in one product, which is for where quack is not."""
    states, weight = draw(rows, terms), draw(columns, terms)
    return lambda: gated(states, weight, None)


def attention(rows: int, heads: int, size: int) -> None:
    """All kernels on a pack of the workload "mixed"."""
    workload = mixed(256, seed=0)
    lengths = [workload.lengths[number] for number in best_fit(workload.lengths, rows)[1]]
    segments = Segments.of([*lengths, *([rows - sum(lengths)] if sum(lengths) < rows else [])], "cuda")
    query, key, value = draw(rows, heads, 3 * size).unflatten(2, (3, size)).unbind(2)
    kernels = [name for name in available_backends("cuda", BF16, size) if name not in ("sdpa", "eager")]
    jobs: dict[str, Any] = {
        name: lambda name=name: varlen_attention(query, key, value, segments, backend=name) for name in kernels
    }
    work = 4 * heads * size * sum(length**2 for length in segments.lengths)
    tell(f"attention, {heads} heads of {size}", jobs, work)


def draw(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, device="cuda").to(BF16)


if __name__ == "__main__":
    main()

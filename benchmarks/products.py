"""Products and attention of one layer on a Hopper GPU: tiles of quack's, cuBLAS beside them, kernels of attention.

    python benchmarks/products.py --rows 16896

The tiles in `nopad/inference/quack_products.py` were chosen by these figures. Random numbers, medians; launches one
after another for a few milliseconds, so that the GPU is cooler than in a long run and everything somewhat faster.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from nopad.bench.workloads import mixed
from nopad.inference.float8 import FLOAT8
from nopad.inference.folding import Matrix
from nopad.inference.quack_epilogues import epilogues
from nopad.inference.quack_products import Tiles, run
from nopad.layers.varlen import available_backends, varlen_attention
from nopad.layout import Segments
from nopad.planner import plan

BF16 = torch.bfloat16
TILES = tuple(Tiles(128, columns, cluster=cluster) for columns in (128, 160, 192, 208) for cluster in ((2, 1), (1, 2)))
PRODUCTS = {
    "qkv": ("normed", 3072, 1024),
    "qkv with biases": ("normed_biased", 3072, 1024),
    "qkv turned": ("turned", 3072, 1024),
    "gate and up": ("gated", 5632, 1024),
    "up, GELU": ("gelu", 4096, 1024),
    "up, GELU by tanh": ("gelu_tanh", 4096, 1024),
    "out": ("added", 1024, 1024),
    "down": ("added", 1024, 2816),
    "qkv in float8": ("normed_float8", 3072, 1024),
    "gate and up in float8": ("gated_float8", 5632, 1024),
    "out, cast to float8": ("added_small", 1024, 1024),
    "down in float8": ("added_small_float8", 1024, 2816),
}
"""Epilogue, columns and terms of a product."""
PARTS = 8
"""That the squares of a row were added up in."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16896, help="tokens of a pack (default: 16896)")
    parser.add_argument("--only", help="names of products that contain this, and no attention")
    options = parser.parse_args()
    for name, (epilogue, columns, terms) in PRODUCTS.items():
        if options.only and options.only not in name:
            continue
        sizes = options.rows, columns, terms
        work = 2 * options.rows * columns * terms / 1e12
        usable = [tiles for tiles in TILES if takes(epilogue, tiles)]
        cells = [f"{name_of(tiles)} {work / seconds(product(epilogue, *sizes, tiles)):.0f}" for tiles in usable]
        print(f"{name}, TFLOP/s: {', '.join(cells)}; cuBLAS alone {work / seconds(cublas(*sizes)):.0f}")
    for heads, size in () if options.only else ((8, 128), (16, 64), (16, 72)):
        attention(options.rows, heads, size)


def name_of(tiles: Tiles) -> str:
    """For the table."""
    return f"{tiles.columns} wide in clusters of {tiles.cluster[0]} by {tiles.cluster[1]}"


def takes(epilogue: str, tiles: Tiles) -> bool:
    """Whether quack can write such tiles: whole heads of a table of 192 columns, pairs of columns by the 32."""
    if epilogue == "turned":
        return tiles.columns == 192
    return not epilogue.startswith("gated") or tiles.columns % 32 == 0


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
    if epilogue == "turned":
        operands["table"] = torch.randn(rows, 192, device="cuda").half()
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
        run(chosen, states, matrix, output, operands, (tiles,), residual)

    return multiply


def cublas(rows: int, columns: int, terms: int) -> Callable[[], Tensor]:
    """The bare product in bfloat16."""
    states, weight, output = draw(rows, terms), draw(columns, terms), draw(rows, columns)
    return lambda: torch.mm(states, weight.T, out=output)


def attention(rows: int, heads: int, size: int) -> None:
    """Print all kernels' times on a pack of the workload "mixed"."""
    workload = mixed(256, seed=0)
    lengths = [workload.lengths[number] for number in plan(workload.lengths, rows)[1]]
    segments = Segments.of([*lengths, *([rows - sum(lengths)] if sum(lengths) < rows else [])], "cuda")
    query, key, value = draw(rows, heads, 3 * size).unflatten(2, (3, size)).unbind(2)
    work = 4 * heads * size * sum(length**2 for length in segments.lengths)
    cells = []
    for backend in available_backends("cuda", BF16, size):
        if backend not in ("sdpa", "eager"):
            time = seconds(lambda kernel=backend: varlen_attention(query, key, value, segments, backend=kernel))
            cells.append(f"{backend} {time * 1e6:.0f} µs, {work / time / 1e12:.0f} TFLOP/s")
    print(f"attention, {heads} heads of {size}: {'; '.join(cells)}")


def draw(*shape: int) -> Tensor:
    """Normal random numbers."""
    return torch.randn(*shape, device="cuda").to(BF16)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the median of five times twenty."""
    samples = []
    for _ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            work()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop) / 20e3)
    return statistics.median(samples[1:])  # the first compiles


if __name__ == "__main__":
    main()

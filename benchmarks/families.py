"""Encoders of every family, compiled and in float8, over the workload "mixed" of `nopad bench`, as a Markdown table.

    python benchmarks/families.py
    python benchmarks/families.py --device cpu --names facebook/PE-Core-T16-384 --images 2 --runs 1

Random weights, random pixels, packs of one capacity. The runs of a model are interleaved, with plain GEMMs before and
after each, as those of `nopad bench` are. A row is printed as soon as it is measured; of a model that does not run, the
reason. The cosine is the lowest of a token, to the eager encoder in the same dtype on the image alone.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from torch._dynamo import config as dynamo

import nopad
from nopad.bench.candidates import Images, packed
from nopad.bench.defaults import defaults_on
from nopad.bench.report import MeasuredPeak, Row
from nopad.bench.run import RECOMPILE_LIMIT
from nopad.bench.runner import run_candidates
from nopad.bench.timing import timer
from nopad.bench.workloads import mixed
from nopad.encoder import PackedEncoder

NAMES = (
    "facebook/dinov2-large",
    "openai/clip-vit-large-patch14-336",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    "nvidia/C-RADIOv3-L",
    "nvidia/C-RADIOv4-H",
    "moonshotai/Kimi-K2.5",
    "mistral-community/pixtral-12b",
    "facebook/PE-Core-L14-336",
    "facebook/PE-Lang-L14-448",
    "google/siglip-so400m-patch14-384",
    "google/vit-large-patch16-224",
    "apple/aimv2-large-patch14-native",
    "facebook/dinov3-vitl16-pretrain-lvd1689m",
    "lmms-lab-encoder/onevision-encoder-large",
)
"""Of each family one or two, those first that docs/performance.md has no figures of."""
CAPACITY = {"cuda": 16896, "cpu": 2048}
COLUMNS = ("model", "D", "heads", "run", "layers", "ms", "tokens/s", "TFLOP/s", "peak", "of peak", "cosine")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", default=",".join(NAMES), help="published names with commas, see `nopad models`")
    parser.add_argument("--device", default="cuda", choices=CAPACITY, help="default: cuda")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--capacity", type=int, help=f"tokens per pack (default: {CAPACITY})")
    parser.add_argument("--images", type=int, help="of the workload (default: 256 on a GPU, 2 on a CPU)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--seconds", type=float, default=270, help="no model is begun later (default: 270)")
    options = parser.parse_args()
    default = defaults_on(options.device)
    options.capacity = options.capacity or CAPACITY[options.device]
    options.images = options.images or default.images
    options.dtype = getattr(torch, options.dtype or default.dtype)
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    stop = time.monotonic() + options.seconds
    with torch.no_grad(), dynamo.patch(recompile_limit=RECOMPILE_LIMIT):
        for name in options.names.split(","):
            late = time.monotonic() > stop
            rows = [failed(name, "no time left, see --seconds")] if late else measure(name, options)
            for row in rows:
                line(row)
            gc.collect()  # compiled encoders refer to themselves
            torch.compiler.reset()


def line(cells: Sequence[str]) -> None:
    """Print a row of the table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def measure(name: str, options: argparse.Namespace) -> list[list[str]]:
    """The rows of one model: compiled, and in float8."""
    try:
        encoder = nopad.load(f"untrained:{name}", device=options.device, dtype=options.dtype)
        workload = mixed(options.images, seed=0).in_multiples_of(encoder.merge_size)
        images = Images.of(workload, encoder, seed=0)
        rows, peak = run_candidates(
            encoder,
            [packed(encoder, images, options.capacity, compiled=True, precision=each) for each in (None, "fp8")],
            workload=workload.name,
            compile=True,
            runs=options.runs,
            timer=timer(encoder.device),
            progress=lambda message: None,
        )
        return [cells(name, encoder, row, peak) for row in rows]
    except Exception as error:  # whatever it is, the other models are measured
        return [failed(name, f"{type(error).__name__}: {error}")]


def cells(name: str, encoder: PackedEncoder, row: Row, peak: MeasuredPeak) -> list[str]:
    """A row of the table."""
    attention: Any = encoder.layers[0].attention
    model = [name, str(encoder.hidden_size), f"{attention.num_heads} × {attention.head_dim}", row.name]
    if row.skipped is not None or row.median is None:
        return [*model, reason(row.skipped or "")]
    figures = [f"{row.median * 1e3:.1f}", f"{row.tokens_per_second:,.0f}", f"{row.teraflops:.4g}"]
    of_peak = [f"{peak.teraflops:.4g}", f"{peak.share(row):.3f}"]
    return [*model, str(row.execution), *figures, *of_peak, f"{row.min_cosine:.6f}"]


def failed(name: str, message: str) -> list[str]:
    """The row of a model that was not measured."""
    return [name, "", "", "", reason(message)]


def reason(message: str) -> str:
    """A reason that fits into a cell."""
    return shorten(message.replace("|", "/"), 200, placeholder=" …")


if __name__ == "__main__":
    main()

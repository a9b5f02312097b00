"""The ways to run an encoder's layers on a CPU: eager, in blocks by each kind of linear layer, and by torch.compile.

    python benchmarks/cpu_layers.py facebook/dinov3-vits16-pretrain-lvd1689m --ways onednn:256,torch:1024

Random weights, random pixels, images of the workload "mixed" of `nopad bench`; medians over interleaved rounds, between
which plain GEMMs are run. A way is a library and the rows of a block, or `compiler`: `torch.compile` for any sizes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import nopad
from nopad.bench.candidates import Images
from nopad.bench.runner import attention_lengths, block_parameters
from nopad.bench.timing import PEAK_GEMMS, flops, gemm_flops, gemms, interleave, timer
from nopad.bench.workloads import mixed
from nopad.encoder import PackedEncoder
from nopad.inference.fusion import blocked
from nopad.inference.fusion.cpu_linear import CPULinear, OneDNNLinear, TorchLinear
from nopad.packing import Pack
from nopad.pipeline.packer import best_fit

CPU = torch.device("cpu")
EAGER, COMPILER = "eager", "compiler"
LINEARS: dict[str, type[CPULinear]] = {"onednn": OneDNNLinear, "torch": TorchLinear}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a published name, see `nopad models`")
    parser.add_argument("--ways", default="onednn:256,torch:1024", help="of LIBRARY:ROWS and compiler, with commas")
    parser.add_argument("--images", type=int, default=4, help="of the workload (default: 4)")
    parser.add_argument("--capacity", type=int, default=2048, help="tokens per pack (default: 2048)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--profile", action="store_true", help="print the operators of the last way")
    options = parser.parse_args()
    with torch.no_grad():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Print a line for each way."""
    encoder = nopad.load(f"untrained:{options.model}", dtype=getattr(torch, options.dtype))
    images = Images.of(mixed(options.images, seed=0), encoder, seed=0)
    rows = [length + encoder.num_prefix_tokens for length in images.workload.lengths]
    packs = [images.pack(encoder, indices) for indices in best_fit(rows, options.capacity)]
    peak = gemms(*PEAK_GEMMS["cpu"], CPU, encoder.dtype)
    jobs: dict[str, Callable[[], object]] = {"GEMMs": peak, EAGER: run(encoder, packs)}
    jobs[EAGER]()
    for way in options.ways.split(","):
        start = time.perf_counter()
        jobs[way] = run(prepared(encoder, way, options.capacity, max(map(len, packs))), packs)
        jobs[way]()
        print(f"{way}: prepared and run once in {time.perf_counter() - start:.1f} s", flush=True)
    work = flops(block_parameters(encoder), encoder.hidden_size, attention_lengths(encoder, rows))
    samples = dict(zip(jobs, interleave(timer(CPU), list(jobs.values()), range(options.rounds)), strict=True))
    medians = {name: statistics.median(sample.seconds for sample in each) for name, each in samples.items()}  # pyright: ignore
    print(f"{torch.get_num_threads()} threads; {images.workload.describe()}")
    top = gemm_flops(*PEAK_GEMMS["cpu"]) / medians.pop("GEMMs")
    for name, seconds in medians.items():
        times = medians[EAGER] / seconds
        print(f"{name:12} {seconds * 1e3:9.1f} ms, {times:.2f} × eager, {work / seconds / top:.2f} of the GEMMs' speed")
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            list(jobs.values())[-1]()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=60))


def run(encoder: PackedEncoder, packs: list[Pack]) -> Callable[[], object]:
    """A job that encodes all packs."""
    return lambda: [encoder(pack) for pack in packs]


def prepared(encoder: PackedEncoder, way: str, capacity: int, max_segments: int) -> PackedEncoder:
    """A copy that shares the weights, ready to run in this way."""
    twin = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    if way == COMPILER:
        twin.forward = torch.compile(twin.forward, dynamic=True)
        return twin
    library, _, rows = way.partition(":")
    with blocks(LINEARS[library], int(rows)):
        twin.compile(capacity=capacity, max_segments=max_segments)
    return twin


@contextmanager
def blocks(linear: type[CPULinear], rows: int) -> Iterator[None]:
    """Encoders that are compiled here use these linear layers and blocks."""
    with (
        mock.patch.object(blocked, "linear_class", return_value=linear),
        mock.patch.object(blocked, "default_block_rows", return_value=rows),
    ):
        yield


if __name__ == "__main__":
    main()

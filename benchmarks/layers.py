"""The ways to run an encoder's layers, interleaved with plain GEMMs, and where their time goes on a GPU.

    python benchmarks/layers.py apple/aimv2-large-patch14-native --ways eager,quack,torch,fp8 --capacity 16896

`nopad bench` measures what a user gets. Here the GEMM backend can be selected, the host's time per pack is printed with
the time of a way, and `--profile` prints the kernels of the last way. Random weights, random pixels, the workload
"mixed" of `nopad bench`; medians.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

import nopad
from nopad.bench.candidates import Images
from nopad.bench.runner import attention_lengths, block_parameters
from nopad.bench.timing import PEAK_GEMMS, flops, gemms, timer
from nopad.bench.workloads import mixed
from nopad.encoder import PackedEncoder
from nopad.inference import compile
from nopad.inference.fusion import layers as fused
from nopad.inference.fusion.gemm import GemmBackend
from nopad.packing import Pack
from nopad.pipeline.packer import best_fit

WAYS = {"eager": "eager", "quack": "fused by quack", "torch": "fused by torch", "fp8": None}
"""The `execution` that each requires; float8 takes the fastest available."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a published name, see `nopad models`")
    parser.add_argument("--ways", default="eager,quack,torch", help=f"of {', '.join(WAYS)}, with commas")
    parser.add_argument("--capacity", type=int, default=16896, help="tokens per pack (default: 16896)")
    parser.add_argument("--images", type=int, default=256, help="of the workload (default: 256)")
    parser.add_argument("--attention", default="auto", help="kernel (default: the best there is)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu, where eager and fp8 run (default: cuda)")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument(
        "--graphs",
        type=int,
        default=compile.MAX_GRAPH_CAPACITY,
        help="largest capacity whose packs are CUDA graphs (default: %(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels of the last way")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if not set(ways) <= set(WAYS):
        parser.error(f"--ways: expected some of {', '.join(WAYS)}, got {options.ways}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("nopad").setLevel(
        logging.INFO
    )  # which has the reason why layers are not compiled in the fastest way
    try:
        with torch.no_grad(), mock.patch.object(compile, "MAX_GRAPH_CAPACITY", options.graphs):
            measure(options, ways)
    except WayNotRunError as problem:
        parser.error(str(problem))


class WayNotRunError(Exception):
    """The layers do not run in the requested way."""


def measure(options: argparse.Namespace, ways: list[str]) -> None:
    """Print a line for each way, and the profile."""
    load: dict[str, Any] = {"device": options.device, "dtype": torch.bfloat16, "attention": options.attention}
    encoder = nopad.load(f"untrained:{options.model}", **load)
    images = Images.of(mixed(options.images, seed=0), encoder, seed=0)
    lengths = [length + encoder.num_prefix_tokens for length in images.workload.lengths]
    numbers = best_fit(lengths, options.capacity)
    packs = [images.pack(encoder, pack) for pack in numbers]
    expected = encoder(packs[0]).float()
    side, count = PEAK_GEMMS[encoder.device.type]
    peak = gemms(side, count, encoder.device, encoder.dtype)
    runs: dict[str, Callable[[], object]] = {"peak": peak}
    busy: dict[str, list[float]] = {}
    print(f"{options.model}, attention {encoder.attention_backend}, {len(packs)} packs of {options.capacity}")
    for way in ways:
        start = time.perf_counter()
        twin = prepared(encoder, way, options.capacity, max(map(len, numbers)))
        seconds = time.perf_counter() - start
        cosine = torch.cosine_similarity(twin(packs[0]).float(), expected, dim=1).min()
        print(f"{way}: layers {twin.execution}, ready in {seconds:.1f} s, min cosine with eager {cosine:.6f}")
        busy[way] = []
        runs[way] = partial(_run, twin, packs, busy[way])
    clock = timer(encoder.device)
    for run in runs.values():
        run()
    for seconds in busy.values():
        seconds.clear()
    seconds_of = {name: [] for name in runs}
    for _ in range(options.runs):
        for name, run in runs.items():
            seconds_of[name].append(clock(run).seconds)
    work = flops(block_parameters(encoder), encoder.hidden_size, attention_lengths(encoder, lengths))
    peak_rate = 2 * side**3 * count / statistics.median(seconds_of.pop("peak"))
    print(f"measured peak: {count} GEMMs of {side}³ a run: {peak_rate / 1e12:.4g} TFLOP/s")
    for way, samples in seconds_of.items():
        middle, spread = statistics.median(samples), f"{min(samples) * 1e3:.1f} … {max(samples) * 1e3:.1f}"
        rate = work / middle
        host = f"host {statistics.median(busy[way]) * 1e3:.1f} ms a pack, at most {max(busy[way]) * 1e3:.1f}"
        of_peak = f"{rate / 1e12:.4g} TFLOP/s, {rate / peak_rate:.3f} of peak"
        print(f"{way}: {middle * 1e3:.1f} ms ({spread}), {of_peak}; {host}")
    if options.profile:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            runs[ways[-1]]()
        print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=20, max_name_column_width=70))


def _run(encoder: PackedEncoder, packs: list[Pack], busy: list[float]) -> None:
    for pack in packs:
        start = time.perf_counter()
        encoder(pack)
        busy.append(time.perf_counter() - start)


def prepared(encoder: PackedEncoder, way: str, capacity: int, images: int) -> PackedEncoder:
    """A twin of the encoder over the same weights that runs in one of `WAYS`.

    Raises:
        WayNotRunError: it runs in another one here.
    """
    twin = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    if way == "fp8":
        twin.to_precision("fp8")
    if way != "eager":
        available = fused.gemm_backends_for

        def slowest(*arguments: Any) -> tuple[list[Callable[[], GemmBackend[Any]]], str | None]:
            backends, reason = available(*arguments)
            return backends[-1:], reason  # torch's comes after quack's

        with mock.patch.object(fused, "gemm_backends_for", slowest if way == "torch" else available):
            twin.compile(capacity, images)
    if WAYS[way] not in (None, twin.execution):
        raise WayNotRunError(
            f"--ways: expected layers {WAYS[way]}, got {twin.execution} for the reason above; leave {way} out"
        )
    return twin


if __name__ == "__main__":
    main()

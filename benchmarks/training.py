"""Forward and backward of an encoder on packs, beside the original model's, interleaved with plain GEMMs.

    python benchmarks/training.py apple/aimv2-large-patch14-native --capacity 16896,37888

Random weights in bfloat16, random pixels, the workload "mixed" of `nopad bench`; the loss is the mean square of the
tokens. FLOPs are three times the forward's, over the patches that an image has: padding does not count. Medians.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import nopad
from nopad.bench.candidates import Baseline, Images
from nopad.bench.runner import block_parameters
from nopad.bench.timing import PEAK_GEMMS, Skipped, flops, gemms, interleave, timer
from nopad.bench.workloads import Workload, mixed
from nopad.encoder import PackedEncoder
from nopad.pipeline.packer import best_fit

Step = Callable[[], None]
WARM_UPS = 2
WAYS = ("eager", "checkpointed", "compiled", "compiled, MLPs checkpointed")
"""Of the packed encoder."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a published name, see `nopad models`")
    parser.add_argument("--capacity", default="16896", help="tokens per pack, with commas (default: 16896)")
    parser.add_argument("--images", type=int, default=96, help="of the workload (default: 96)")
    parser.add_argument("--attention", default="auto", help="kernels, with commas (default: the best there is)")
    parser.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True, help="run the original, too"
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder = nopad.load(f"untrained:{options.model}", device=device, dtype=dtype).train()
    workload = mixed(options.images, seed=0)
    capacities = [int(capacity) for capacity in options.capacity.split(",")]
    steps = dict(_packed(encoder, workload, options.attention.split(","), capacities))
    if options.baselines:
        steps |= _baselines(encoder, f"untrained:{options.model}", workload)
    _measure(encoder, workload, steps, options.runs)


def _packed(
    encoder: PackedEncoder, workload: Workload, backends: Sequence[str], capacities: Sequence[int]
) -> Iterator[tuple[str, Callable[[], Step]]]:
    images = Images.of(workload, encoder, 0)
    for backend, capacity, way in itertools.product(backends, capacities, WAYS):
        yield (
            f"nopad, {way}, {backend}, packs of {capacity:,}",
            partial(_packed_step, encoder, images, way, backend, capacity),
        )


def _packed_step(encoder: PackedEncoder, images: Images, way: str, backend: str, capacity: int) -> Step:
    lengths = [length + encoder.num_prefix_tokens for length in images.workload.lengths]
    groups = best_fit(lengths, capacity)
    packs = [images.pack(encoder, group) for group in groups]
    model = copy.deepcopy(encoder)
    model.set_attention(backend)
    if way == "checkpointed":
        model.activation_checkpointing_enable() if hasattr(
            model, "activation_checkpointing_enable"
        ) else model.gradient_checkpointing_enable()
    model.checkpoint_mlps(way.endswith("MLPs checkpointed"))
    if way.startswith("compiled"):
        model.compile_for_training(capacity, max(map(len, groups)))

    def step() -> None:
        for pack in packs:
            model(pack).float().square().mean().backward()
        if way.startswith("compiled") and model.execution != "compiled":
            raise Skipped("torch.compile did not compile the layers")

    return _with_gradients(model, step)


def _baselines(encoder: PackedEncoder, checkpoint: str, workload: Workload) -> dict[str, Callable[[], Step]]:
    """The original model: by groups of one shape, and every image squashed to the square of the mean size."""
    baseline = Baseline.of(encoder.eval(), checkpoint, revision=None, trust_remote_code=False)
    encoder.train()
    images = Images.of(workload, encoder, 0)
    by_grid: dict[tuple[int, int], list[torch.Tensor]] = {}
    for grid, pixels in zip(workload.grids, images.pixels, strict=True):
        by_grid.setdefault(grid, []).append(pixels)
    side = encoder.patch_size * 32
    square = [torch.randn(len(workload.grids), 3, side, side, device=encoder.device).to(encoder.dtype)]
    largest = [max(sides) * encoder.patch_size for sides in zip(*workload.grids, strict=True)]
    padded = [torch.randn(len(workload.grids), 3, *largest, device=encoder.device).to(encoder.dtype)]
    return {
        f"original, grouped by shape ({len(by_grid)} batches)": lambda: _original(
            baseline, encoder, [torch.stack(same) for same in by_grid.values()], compiled=False
        ),
        f"original, squashed to {side} × {side}, compiled": lambda: _original(baseline, encoder, square, compiled=True),
        f"original, padded to {largest[0]} × {largest[1]}, compiled": lambda: _original(
            baseline, encoder, padded, compiled=True
        ),
    }


def _original(baseline: Baseline, encoder: PackedEncoder, batches: list[torch.Tensor], *, compiled: bool) -> Step:
    if baseline.reference is None:
        raise Skipped(baseline.description)
    reference, model = baseline.reference, copy.deepcopy(baseline.model).train().requires_grad_(True)
    parts = [part for batch in batches for part in batch.split(32)]

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return reference.run_batch(model, pixels)

    call = torch.compile(forward) if compiled else forward

    def step() -> None:
        for pixels in parts:
            call(pixels).float().square().mean().backward()

    return _with_gradients(model, step)


def _with_gradients(model: Any, step: Step) -> Step:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            step()

    return run


def _measure(encoder: PackedEncoder, workload: Workload, steps: dict[str, Callable[[], Step]], runs: int) -> None:
    """Prepare, warm up and time one after another, each with the peak in turns; models of others are not kept."""
    device = encoder.device
    side, count = PEAK_GEMMS[device.type]
    peak = gemms(side, count, device, encoder.dtype)
    lengths = [length + encoder.num_prefix_tokens for length in workload.lengths]
    total = 3 * flops(block_parameters(encoder), encoder.config.num_hidden_layers, encoder.hidden_size, lengths)
    print(f"{len(workload.grids)} images, {workload.tokens:,} patches, {total / 1e12:.1f} TFLOP", flush=True)
    measure = timer(device)
    for name, prepare in steps.items():
        try:
            step = prepare()
            warm_ups = [measure(step) for _ in range(WARM_UPS)]
            times, peaks = interleave(measure, [step, peak], runs)
            if isinstance(times, str) or isinstance(peaks, str):
                raise Skipped(str(times))
        except (Skipped, torch.OutOfMemoryError, ValueError, ImportError) as reason:
            print(f"{name:58} not run: {str(reason).splitlines()[0][:100]}", flush=True)
            continue
        seconds = statistics.median(sample.seconds for sample in times)
        best = 2 * side**3 * count / statistics.median(sample.seconds for sample in peaks)
        memory = max((sample.peak_memory_bytes or 0) for sample in times) / 2**30
        print(
            f"{name:58} {seconds * 1e3:9.1f} ms {len(workload.grids) / seconds:8.1f} images/s "
            f"{workload.tokens / seconds:10,.0f} tokens/s {total / seconds / best:6.3f} of peak {memory:6.1f} GiB "
            f"(first step {warm_ups[0].seconds:.0f} s)",
            flush=True,
        )
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

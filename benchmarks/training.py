"""Forward and backward of an encoder on packs, beside the original model's, interleaved with plain GEMMs.

    python benchmarks/training.py apple/aimv2-large-patch14-native --capacity 16896,37888

Random weights in bfloat16, random pixels, the workload "mixed" of `nopad bench`; the loss is the mean square of the
tokens. FLOPs are three times the forward's, over the tokens that an image has: padding does not count, and squashed
images have those of the square. Medians.

The original takes 32 images at a time: squashed to the square of 32 × 32 patches, padded to the most rows and columns
of all (NaFlex: to the longest, with a mask), or grouped by shape.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nopad
from nopad.bench.baselines import Baseline
from nopad.bench.candidates import Images
from nopad.bench.runner import attention_lengths, block_parameters
from nopad.bench.timing import PEAK_GEMMS, Skipped, flops, gemms, interleave, timer
from nopad.bench.workloads import Workload, mixed
from nopad.encoder import PackedEncoder
from nopad.pipeline.packer import best_fit

WARM_UPS = 2
WAYS = ("eager", "checkpointed", "compiled", "compiled, MLPs checkpointed")
"""Of the packed encoder."""
PEERS = ("squashed", "padded", "grouped")
"""Of the original."""
BATCH = 32
"""Images that the original takes at a time."""
SQUARE = 32
"""Patches along a side of a squashed image."""
Step = Callable[[], None]


class Candidate(NamedTuple):
    """What is measured: its name, the tokens of its images, and what makes it ready."""

    name: str
    lengths: Sequence[int]
    prepare: Callable[[], Step]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="published names, see `nopad models`")
    parser.add_argument("--capacity", default="16896", help="tokens per pack, with commas (default: 16896)")
    parser.add_argument("--images", type=int, default=96, help="of the workload (default: 96)")
    parser.add_argument("--attention", default="auto", help="kernels, with commas (default: the best there is)")
    parser.add_argument("--ways", default="", help=f"of nopad, with semicolons (default: {'; '.join(WAYS)})")
    parser.add_argument("--peers", default=",".join(PEERS), help="of the original, with commas (default: %(default)s)")
    parser.add_argument(
        "--compile-peers",
        choices=["layers", "whole"],
        default="layers",
        help="what of the original is compiled (default: %(default)s)",
    )
    parser.add_argument("--gradients", action="store_true", help="print how far they are from those in float32, too")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each (default: 5)")
    options = parser.parse_args()

    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    workload = mixed(options.images, seed=0)
    capacities = [int(capacity) for capacity in options.capacity.split(",")]
    ways = [way.strip() for way in options.ways.split(";")] if options.ways else WAYS
    peers = options.peers.split(",") if options.peers else []
    if options.images > BATCH and options.images % BATCH:
        parser.error(f"--images: expected a multiple of {BATCH}, got {options.images}")
    for requested, choices in ((ways, WAYS), (peers, PEERS)):
        if set(requested) - set(choices):
            parser.error(f"expected some of {choices}, got {requested}")
    for model in options.models:
        encoder = nopad.load(f"untrained:{model}", device=device, dtype=dtype, head=False).train()
        candidates = [*_packed(encoder, workload, options.attention.split(","), capacities, ways)]
        if peers:
            candidates += _originals(encoder, workload, peers, whole=options.compile_peers == "whole")
        print(f"\n{model}: {len(workload.grids)} images, {workload.tokens:,} patches", flush=True)
        if options.gradients:
            _compare_gradients(encoder, mixed(8, seed=0), capacities[0])
        _measure(encoder, candidates, options.runs)


def _packed(
    encoder: PackedEncoder, workload: Workload, backends: Sequence[str], capacities: Sequence[int], ways: Sequence[str]
) -> Iterator[Candidate]:
    images = Images.of(workload, encoder, 0)
    for backend, capacity, way in itertools.product(backends, capacities, ways):
        prepare = partial(_packed_step, encoder, images, way, backend, capacity)
        yield Candidate(f"nopad, {way}, {backend}, packs of {capacity:,}", workload.lengths, prepare)


def _packed_step(encoder: PackedEncoder, images: Images, way: str, backend: str, capacity: int) -> Step:
    lengths = [length + encoder.num_prefix_tokens for length in images.workload.lengths]
    groups = best_fit(lengths, capacity)
    packs = [images.pack(encoder, group) for group in groups]
    model = copy.deepcopy(encoder)
    model.set_attention(backend)
    if way == "checkpointed":
        model.activation_checkpointing_enable()
    model.checkpoint_mlps(way.endswith("MLPs checkpointed"))
    if way.startswith("compiled"):
        model.compile_for_training(capacity, max(map(len, groups)))

    def step() -> None:
        for pack in packs:
            model(pack).float().square().mean().backward()
        if way.startswith("compiled") and model.execution != "compiled":
            raise Skipped("torch.compile did not compile the layers")

    return _with_gradients(model, step)


def _originals(encoder: PackedEncoder, workload: Workload, peers: Sequence[str], *, whole: bool) -> Iterator[Candidate]:
    """The original model with the same weights."""
    baseline = Baseline.of(encoder.eval(), str(encoder.source), revision=None, trust_remote_code=False)
    encoder.train()
    images = Images.of(workload, encoder, 0).pixels
    number, side = len(workload.grids), encoder.patch_size * SQUARE
    batch = min(BATCH, number)
    largest = [max(sides) * encoder.patch_size for sides in zip(*workload.grids, strict=True)]
    compiled = "compiled" if whole else "layers compiled"
    for peer in peers:
        lengths, compiles = workload.lengths, peer != "grouped"
        if peer == "squashed":
            name, lengths = f"squashed to {side} × {side}, {compiled}", (SQUARE**2,) * number
            batches = [_noise(encoder, batch, side, side)] * (number // batch)
        elif peer == "grouped":
            by_shape: dict[tuple[int, int], list[Tensor]] = {}
            for grid, pixels in zip(workload.grids, images, strict=True):
                by_shape.setdefault(grid, []).append(pixels)
            name, batches = f"grouped by shape ({len(by_shape)} batches)", list(map(torch.stack, by_shape.values()))
        elif baseline.reference is not None and baseline.reference.takes_padding(encoder):
            name = f"padded to {max(workload.lengths):,} patches and masked, {compiled}"
            batches = [images[start : start + batch] for start in range(0, number, batch)]
        else:
            name = f"padded to {largest[0]} × {largest[1]}, {compiled}"
            batches = [_noise(encoder, batch, *largest)] * (number // batch)
        compiler = whole if compiles else None
        yield Candidate(f"original, {name}", lengths, partial(_original, baseline, batches, compiler))


def _noise(encoder: PackedEncoder, *shape: int) -> Tensor:
    number, height, width = shape
    return torch.randn(number, encoder.config.num_channels, height, width, device=encoder.device).to(encoder.dtype)


def _original(baseline: Baseline, batches: Sequence[Any], whole: bool | None) -> Step:
    """A step of the original, compiled whole or by layers, or with `None` as it is."""
    if baseline.reference is None:
        raise Skipped(baseline.description)
    reference, model = baseline.reference, copy.deepcopy(baseline.model).train().requires_grad_(True)
    if whole:
        model.compile(dynamic=False)
    elif whole is not None:
        for layer in reference.layers(model):
            layer.compile(dynamic=False)

    def tokens_of(batch: Any) -> Tensor:
        if isinstance(batch, Tensor):
            return reference.run_batch(model, batch)
        return torch.cat(reference.run_padded(model, batch))

    def step() -> None:
        for batch in batches:
            tokens_of(batch).float().square().mean().backward()

    return _with_gradients(model, step)


def _compare_gradients(encoder: PackedEncoder, workload: Workload, capacity: int) -> None:
    """Print the distance of all gradients together to those of the original in float32, over the norm of these.

    The loss is the sum of the tokens times normal numbers, of a few images; the original takes one at a time.
    """
    baseline = Baseline.of(encoder, str(encoder.source), revision=None, trust_remote_code=False)
    if baseline.reference is None:
        return print(f"gradients: {baseline.description}")
    reference, images = baseline.reference, Images.of(workload, encoder, 0)
    factors = [torch.randn(length, encoder.hidden_size, device=encoder.device) for length in workload.lengths]
    models: dict[str, Any] = {"float32": copy.deepcopy(baseline.model).float(), "the original's": baseline.model}
    models |= {"eager": copy.deepcopy(encoder), "compiled": copy.deepcopy(encoder)}
    models["compiled"].compile_for_training(capacity, len(factors))
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        model.eval().requires_grad_(True)  # DINOv3 moves its coordinates at random in training
        with torch.enable_grad():
            if isinstance(model, PackedEncoder):
                tokens = model(images.pack(model, range(len(factors)))).split(list(workload.lengths))
            else:
                tokens = (reference.run(model, pixels.to(model.dtype))[0] for pixels in images.pixels)
            losses = [(each.float() * factor).sum() for each, factor in zip(tokens, factors, strict=True)]
            torch.stack(losses).sum().backward()
        gradients[name] = {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    expected = gradients.pop("float32")
    norm = torch.stack([each.norm() for each in expected.values()]).norm()
    distances = {
        name: float(torch.stack([(actual[key] - expected[key]).norm() for key in expected]).norm() / norm)
        for name, actual in gradients.items()
    }
    of_original = distances.pop("the original's")
    others = ", ".join(
        f"{name} {distance:.4f} ({distance / of_original:.2f} ×)" for name, distance in distances.items()
    )
    print(f"distance of gradients to float32's: the original's {of_original:.4f}, {others}", flush=True)


def _with_gradients(model: Any, step: Step) -> Step:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            step()

    return run


def _measure(encoder: PackedEncoder, candidates: Iterable[Candidate], runs: int) -> None:
    """Prepare, warm up and time one after another, each with the peak in turns; models of others are not kept."""
    device = encoder.device
    side, count = PEAK_GEMMS[device.type]
    peak = gemms(side, count, device, encoder.dtype)
    measure = timer(device)
    for name, lengths, prepare in candidates:
        torch._dynamo.reset()
        rows = [length + encoder.num_prefix_tokens for length in lengths]
        total = 3 * flops(block_parameters(encoder), encoder.hidden_size, attention_lengths(encoder, rows))
        try:
            step = prepare()
            warm_ups = [measure(step) for _ in range(WARM_UPS)]
            times, peaks = interleave(measure, [step, peak], range(runs))
            if isinstance(times, str) or isinstance(peaks, str):
                raise Skipped(str(times))
        except (Skipped, torch.OutOfMemoryError, ValueError, ImportError) as reason:
            print(f"{name:66} not run: {str(reason).splitlines()[0][:100]}", flush=True)
            continue
        seconds = statistics.median(sample.seconds for sample in times)
        best = 2 * side**3 * count / statistics.median(sample.seconds for sample in peaks)
        memory = max((sample.peak_memory_bytes or 0) for sample in times) / 2**30
        print(
            f"{name:66} {seconds * 1e3:9.1f} ms {len(lengths) / seconds:8.1f} images/s "
            f"{sum(lengths) / seconds:10,.0f} tokens/s {total / seconds / best:6.3f} of peak {memory:6.1f} GiB "
            f"(first step {warm_ups[0].seconds:.0f} s)",
            flush=True,
        )
        del step
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

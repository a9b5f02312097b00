"""The benchmark of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from nopad.bench.baselines import Baseline, candidates
from nopad.bench.candidates import Images
from nopad.bench.defaults import Defaults, defaults_on
from nopad.bench.report import BenchReport, MeasuredPeak, Row, WorkloadStats
from nopad.bench.runner import block_parameters, run_candidates
from nopad.bench.timing import timer
from nopad.bench.workloads import Workload, fixed, mixed, small
from nopad.counts import check_count
from nopad.encoder import PackedEncoder
from nopad.environment import check_device, device_name, dtype_name, versions
from nopad.loading import load

logger = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Graphs of one function in a benchmark, whose candidates compile for every capacity and size."""


def bench(
    checkpoint: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    workload: Literal["mixed", "small", "224", "all"] = "mixed",
    images: int | None = None,
    capacities: Sequence[int] | None = None,
    baselines: bool = True,
    compile: bool | None = None,
    float8: bool = False,
    int8: bool = False,
    runs: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    prefix: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> BenchReport:
    """Time the packed encoder and the reference on the same weights and images, from patches to normed tokens.

    Pixels are random and on the device before the clock starts. A run is the whole workload. The runs of the candidates
    are interleaved, and plain GEMMs in `dtype` run around each of them as the measured peak. The features of some
    images are compared with the packed encoder's on each of these images alone.

    Args:
        checkpoint, device, dtype, attention, revision, prefix: as `nopad.load` takes them.
        workload: `"mixed"` sizes, `"224"` pixels (or the model's own fixed size), `"all"` of these, or `"small"`
            images of 16 to 100 patches.
        images: number of images of each workload.
        capacities: tokens per pack; duplicates run once.
        baselines: run the reference, too.
        compile: run compiled candidates, too; on a CPU, by default, those that need no compiler.
        float8, int8: run the packed encoder with `precision="fp8"` or `"int8"`, too; they imply `compile`.
        runs: timed runs of each candidate.
        seed: seed of sizes and pixels.
        trust_remote_code: run the checkpoint's own code where its reference is not part of transformers.
        progress: called with a line for each step.

    Arguments that are `None` depend on the device, see `nopad.bench.defaults`.

    Raises:
        ValueError: an argument out of its range, a capacity below the largest image, or a checkpoint that does not
            load.
    """
    for name, requested in (("float8", float8), ("int8", int8)):
        if requested and compile is False:
            raise ValueError(f"{name}: runs the packed encoder compiled, got compile=False too; give one of them")
    device = check_device("device", device)
    default = defaults_on(device.type)
    settings = Defaults(
        default.dtype if dtype is None else dtype_name(dtype),
        default.images if images is None else images,
        tuple(dict.fromkeys(default.capacities if capacities is None else capacities)),
        default.runs if runs is None else runs,
        default.compile or float8 if compile is None else compile,
    )
    _check(device, workload, settings)
    progress(f"loading {checkpoint}")
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype), "attention": attention}
    encoder = load(checkpoint, revision=revision, prefix=prefix, device=device, **options)
    workloads = _workloads(encoder, settings.images, seed)
    _check_capacities(settings.capacities, [workloads[name] for name in _NAMES[workload]], encoder.num_prefix_tokens)
    baseline = None
    if baselines:
        progress("loading the reference")
        baseline = Baseline.of(encoder, str(checkpoint), revision=revision, trust_remote_code=trust_remote_code)
    stats: list[WorkloadStats] = []
    rows: list[Row] = []
    with _timing_context(device, compile=settings.compile):
        square_images = Images.of(workloads["224"], encoder, seed)
        for name in _NAMES[workload]:
            inputs = square_images if name == "224" else Images.of(workloads[name], encoder, seed)
            precisions = ["fp8"] * float8 + ["int8"] * int8
            of_workload, peak = run_candidates(
                encoder,
                candidates(encoder, baseline, inputs, square_images, settings.capacities, precisions),
                workload=workloads[name].name,
                compile=settings.compile or compile,
                runs=settings.runs,
                timer=timer(device),
                progress=progress,
            )
            rows += of_workload
            stats.append(_stats(workloads[name], peak))
    return _report(encoder, checkpoint, baseline, settings, seed, stats, rows)


_NAMES = {"mixed": ("mixed",), "small": ("small",), "224": ("224",), "all": ("mixed", "224")}
"""The workloads of each `workload`."""


def _workloads(encoder: PackedEncoder, images: int, seed: int) -> dict[str, Workload]:
    """Each workload by its name; `"224"` is the model's own size where that is fixed."""
    size, multiple = encoder.default_preprocessing.size, encoder.merge_size
    side = size if isinstance(size, int) else 224
    drawn = {"mixed": mixed(images, seed), "small": small(images, seed)}
    squares = fixed(images, side - side % (encoder.patch_size * multiple), encoder.patch_size)
    return {name: each.in_multiples_of(multiple) for name, each in drawn.items()} | {"224": squares}


@contextmanager
def _timing_context(device: torch.device, *, compile: bool) -> Iterator[None]:
    """Without gradients, on the GPU, with as many graphs as candidates compile."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if compile:
            from torch._dynamo import config as dynamo

            # Beyond the limit torch runs a function uncompiled, without an error.
            stack.enter_context(dynamo.patch(recompile_limit=RECOMPILE_LIMIT))
        yield


def _stats(workload: Workload, peak: MeasuredPeak) -> WorkloadStats:
    sizes, longest = len(set(workload.grids)), max(workload.lengths)
    return WorkloadStats(workload.name, len(workload.grids), sizes, workload.tokens, longest, peak)


def _report(
    encoder: PackedEncoder,
    checkpoint: str | Path,
    baseline: Baseline | None,
    settings: Defaults,
    seed: int,
    stats: Sequence[WorkloadStats],
    rows: Sequence[Row],
) -> BenchReport:
    has_model = baseline is not None and baseline.model is not None
    description = "not requested" if baseline is None else baseline.description
    return BenchReport(
        checkpoint=str(checkpoint),
        family=encoder.family,
        reference=description if has_model else None,
        no_reference=None if has_model else description,
        device=device_name(encoder.device),
        dtype=settings.dtype,
        attention=encoder.attention_backend,
        versions=versions(encoder.device),
        parameters=block_parameters(encoder),
        seed=seed,
        runs=settings.runs,
        workloads=tuple(stats),
        rows=tuple(rows),
    )


def _check(device: torch.device, workload: str, settings: Defaults) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, which this can time, got {str(device)!r}")
    if workload not in _NAMES:
        raise ValueError(f"workload: expected 'mixed', 'small', '224' or 'all', got {workload!r}")
    check_count("images", settings.images)
    check_count("runs", settings.runs)
    for capacity in settings.capacities:
        check_count("capacities", capacity)
    if not settings.capacities:
        raise ValueError("capacities: expected at least one, got []")


def _check_capacities(capacities: Sequence[int], workloads: Sequence[Workload], prefix: int) -> None:
    longest = max(max(workload.lengths) for workload in workloads) + prefix
    if min(capacities) < longest:
        raise ValueError(f"capacities: expected at least {longest} tokens, the largest image's, got {min(capacities)}")

"""Contestants against each other: warmed up and checked one by one, timed in turn, the ceiling around each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from textwrap import shorten
from typing import NamedTuple

import torch

from nopad.bench.candidates import Contestant, Features, Prepared, Run, reference_features
from nopad.bench.report import Ceiling, Row, counted
from nopad.bench.timing import CEILING, Meter, NotRun, Sample, flops, in_turn, multiplying
from nopad.encoder import PackedEncoder

CHECKED = 8
"""Images of a workload whose features every contestant has to get right."""
WARM_UPS = {"cuda": 3, "cpu": 1}
"""Runs of what is compiled before the clock starts: the first compiles, the next may record a graph; of others one."""


class Ready(NamedTuple):
    """A contestant that has been warmed up."""

    prepared: Prepared
    samples: list[Sample]
    min_cosine: float


def race(
    encoder: PackedEncoder,
    contestants: Sequence[Contestant],
    *,
    workload: str,
    compile: bool,
    runs: int,
    measure: Meter,
    progress: Callable[[str], None],
) -> tuple[list[Row], Ceiling]:
    """A row for each contestant, in their order, and the ceiling, in the dtype and on the device of `encoder`.

    What is compiled runs only where `compile` says so.
    """
    side, products = CEILING[encoder.device.type]
    multiply = multiplying(side, products, encoder.device, encoder.dtype)
    multiply()
    truths: dict[int, Features] = {}
    entries: list[Ready | str] = []
    for contestant in contestants:
        if contestant.compiled and not compile:
            entries.append("compiling was not asked for")
            continue
        images = contestant.images
        if id(images) not in truths:
            truths[id(images)] = reference_features(encoder, images, checked(len(images.pixels)))
        packs = f", packs of {contestant.capacity:,}" if contestant.capacity else ""
        progress(f"{workload}: {contestant.name}{packs}")
        try:
            times = WARM_UPS[encoder.device.type] if contestant.compiled else 1
            entries.append(_warm_up(contestant, truths[id(images)], times, measure))
        except NotRun as reason:
            entries.append(str(reason))
    progress(f"{workload}: {counted(runs, 'timed run')} of each, and of the ceiling around it")
    jobs = [_job(entry.prepared.run) for entry in entries if isinstance(entry, Ready)]
    results = in_turn(measure, [multiply, *(part for job in jobs for part in (job, multiply))], runs)
    ceilings = [_seconds(samples) for samples in results[::2]]
    timed = zip(results[1::2], pairwise(ceilings), strict=True)
    rows = []
    for contestant, entry in zip(contestants, entries, strict=True):
        samples, around = next(timed) if isinstance(entry, Ready) else (entry, ())
        row = _empty_row(encoder, workload, contestant)
        if isinstance(entry, Ready) and isinstance(samples, list):
            peaks = [sample.peak_bytes for sample in (*entry.samples, *samples) if sample.peak_bytes is not None]
            row = replace(
                row,
                seconds=tuple(_seconds(samples)),
                ceilings=tuple(map(statistics.mean, zip(*around, strict=True))),
                peak_bytes=contestant.weight_bytes + max(peaks) if peaks else None,
                min_cosine=entry.min_cosine,
                layers=entry.prepared.layers,
            )
        rows.append(row if isinstance(samples, list) else replace(row, not_run=samples))
    return rows, Ceiling(side, products, tuple(chain.from_iterable(zip(*ceilings, strict=True))))


def checked(images: int) -> list[int]:
    """The numbers of at most `CHECKED` images, spread over all, the first and the last among them."""
    last = images - 1
    return sorted({round(step * last / (CHECKED - 1)) for step in range(CHECKED)})


def min_cosine(ours: Features, theirs: Features) -> float:
    """Least cosine between tokens of the same images; NaN where images or shapes differ."""
    if {n: part.shape for n, part in ours.items()} != {n: part.shape for n, part in theirs.items()}:
        return math.nan
    # Reduced by torch: Python's min passes over a NaN that does not stand first.
    least = [torch.cosine_similarity(ours[n].double(), theirs[n].double(), dim=-1).min() for n in ours]
    return float(torch.stack(least).min())


def block_parameters(encoder: PackedEncoder) -> int:
    """Parameters of all transformer blocks."""
    return sum(parameter.numel() for parameter in encoder.get_submodule("layers").parameters())


def _warm_up(contestant: Contestant, truth: Features, times: int, measure: Meter) -> Ready:
    ready: list[tuple[Prepared, Features]] = []

    def first() -> None:
        prepared = contestant.prepare()
        ready.append((prepared, prepared.run(truth.keys())))

    samples = [measure(_answering(first, compiled=contestant.compiled))]
    prepared, features = ready[0]
    samples += [measure(_job(prepared.run)) for _ in range(times - 1)]
    return Ready(prepared, samples, min_cosine(features, truth))


def _seconds(samples: list[Sample] | str) -> list[float]:
    return [sample.seconds for sample in samples] if isinstance(samples, list) else []


def _job(run: Run) -> Callable[[], None]:
    return _answering(lambda: run(()))


def _answering(action: Callable[[], object], *, compiled: bool = False) -> Callable[[], None]:
    """An action for which what this machine cannot do, memory or compiler, is an answer and no error."""

    def job() -> None:
        try:
            action()
            return
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except RuntimeError as error:
            if not compiled:
                raise
            reason = shorten(str(error), 300, placeholder=" …")
        # Raised here: within the clause it would keep the failed run's tensors.
        raise NotRun(reason)

    return job


def _empty_row(encoder: PackedEncoder, workload: str, contestant: Contestant) -> Row:
    images = contestant.images.workload
    lengths = [length + encoder.num_prefix_tokens for length in images.lengths]
    layers, size = encoder.config.num_hidden_layers, encoder.hidden_size
    return Row(
        workload=workload,
        name=contestant.name,
        capacity=contestant.capacity,
        images=len(images.grids),
        tokens=images.tokens,
        calls=contestant.calls,
        flops=flops(block_parameters(encoder), layers, size, lengths),
    )

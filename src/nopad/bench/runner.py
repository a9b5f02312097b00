"""Runs candidates: prepares and checks one after another, then times them in rounds beside the peak."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from itertools import chain
from textwrap import shorten
from typing import Any

import torch

from nopad.bench.candidates import Candidate, Features, Run, expected_features
from nopad.bench.report import MeasuredPeak, Row
from nopad.bench.timing import PEAK_GEMMS, Sample, Skipped, Timer, flops, gemms, interleave
from nopad.encoder import PackedEncoder

CHECKED_IMAGES = 8
"""Images of a workload whose features are checked, of every candidate."""
WARM_UPS = {"cuda": 3, "cpu": 1}
"""Untimed runs of compiled candidates: the first compiles, the next may record a graph. Others have one."""
Job = Callable[[], None]


def run_candidates(
    encoder: PackedEncoder,
    candidates: Sequence[Candidate],
    *,
    workload: str,
    compile: bool | None,
    runs: int,
    timer: Timer,
    progress: Callable[[str], None],
) -> tuple[list[Row], MeasuredPeak]:
    """A row for each candidate, in their order, and the peak in the dtype and on the device of `encoder`.

    Compiled candidates are skipped unless `compile`; where that is `None`, those that need a compiler.
    """
    side, count = PEAK_GEMMS[encoder.device.type]
    peak = gemms(side, count, encoder.device, encoder.dtype)
    peak()
    expected: dict[int, Features] = {}
    rows: list[Row] = []
    jobs: dict[int, Job] = {}
    for number, candidate in enumerate(candidates, 1):
        row = empty_row(encoder, workload, candidate)
        images = candidate.images
        try:
            if candidate.compiled and not (candidate.no_compiler if compile is None else compile):
                raise Skipped("compiling was not requested")
            if id(images) not in expected:
                progress(f"{workload}: features to compare with")
                expected[id(images)] = expected_features(encoder, images, checked(len(images.pixels)))
            progress(f"{workload}: preparing {number} of {len(candidates)}: {row.label}")
            warm_ups = WARM_UPS[encoder.device.type] if candidate.compiled else 1
            row, run = warm_up(candidate, row, expected[id(images)], warm_ups, timer)
            jobs[len(rows)] = as_job(run)
        except Skipped as reason:
            row = row.skip(str(reason))
        rows.append(row)
    seconds = time_rows(
        rows,
        candidates,
        jobs,
        [peak] * len(rows),
        timer=timer,
        rounds=range(runs),
        progress=lambda line: progress(f"{workload}: {line}"),
    )
    return rows, MeasuredPeak(side, count, seconds or tuple(timer(peak).seconds for _ in range(runs)))


def time_rows(
    rows: list[Row],
    candidates: Sequence[Candidate],
    jobs: Mapping[int, Job],
    peaks: Sequence[Job],
    *,
    timer: Timer,
    rounds: Iterable[int],
    progress: Callable[[str], None],
) -> tuple[float, ...]:
    """Time jobs in rounds, each between two runs of its peak; neighbours that have the same share the run between them.

    Args:
        rows: of all candidates; those of the jobs are replaced by rows with their times.
        candidates, peaks: of each row.
        jobs: by the index of the row.
        timer, rounds: see `interleave`.
        progress: called with a line for each run of a job.

    Returns:
        Seconds of all runs of peaks.
    """
    sequence: list[tuple[Job, int | None]] = []
    places: dict[int, int] = {}
    for index, job in jobs.items():
        if not sequence or sequence[-1][0] is not peaks[index]:
            sequence.append((peaks[index], None))
        places[index] = len(sequence)
        sequence += [(job, index), (peaks[index], None)]

    total = f" of {len(rounds)}" if isinstance(rounds, Sized) else ""

    def on_start(run: int, number: int) -> None:
        index = sequence[number][1]
        if index is not None:
            progress(f"run {run + 1}{total}, {list(jobs).index(index) + 1} of {len(jobs)}: {rows[index].label}")

    results = interleave(timer, [job for job, _ in sequence], rounds, on_start)
    for index, place in places.items():
        samples, around = results[place], (_seconds(results[place - 1]), _seconds(results[place + 1]))
        if isinstance(samples, str):
            rows[index] = rows[index].skip(samples)
        else:
            rows[index] = _timed_row(rows[index], candidates[index], samples, around)
    peak_runs = (_seconds(result) for result, (_, index) in zip(results, sequence, strict=True) if index is None)
    return tuple(chain.from_iterable(zip(*peak_runs, strict=True)))


def checked(images: int) -> list[int]:
    """Indices of at most `CHECKED_IMAGES` images, spread over all, the first and the last among them."""
    last = images - 1
    return sorted({round(step * last / (CHECKED_IMAGES - 1)) for step in range(CHECKED_IMAGES)})


def min_cosine(features: Features, expected: Features) -> float:
    """Lowest cosine between tokens of the same images; NaN where images or shapes differ."""
    if {i: part.shape for i, part in features.items()} != {i: part.shape for i, part in expected.items()}:
        return math.nan
    # Reduced by torch: Python's min passes over a NaN that does not stand first.
    lowest = [torch.cosine_similarity(features[i].double(), expected[i].double(), dim=-1).min() for i in features]
    return float(torch.stack(lowest).min())


def block_parameters(encoder: PackedEncoder) -> int:
    """Parameters of all transformer blocks."""
    return sum(parameter.numel() for parameter in encoder.get_submodule("layers").parameters())


def warm_up(candidate: Candidate, row: Row, expected: Features, warm_ups: int, timer: Timer) -> tuple[Row, Run]:
    """Prepare a candidate, run it and check its features.

    Raises:
        Skipped: it cannot run here.
    """
    prepared: list[tuple[Run, str | None, Features]] = []

    def first() -> None:
        run, execution = candidate.prepare()
        prepared.append((run, execution, run(expected.keys())))

    samples = [timer(_skipping(first, compiled=candidate.compiled))]
    run, execution, features = prepared[0]
    samples += [timer(as_job(run)) for _ in range(warm_ups - 1)]
    cosine = min_cosine(features, expected)
    return replace(row, peak_memory_bytes=_peak_memory(samples), min_cosine=cosine, execution=execution), run


def _timed_row(row: Row, candidate: Candidate, samples: list[Sample], around: tuple[list[float], list[float]]) -> Row:
    memory = [peak for peak in (row.peak_memory_bytes, _peak_memory(samples)) if peak is not None]
    return replace(
        row,
        seconds=tuple(_seconds(samples)),
        peak_seconds=tuple(map(statistics.mean, zip(*around, strict=True))),
        peak_memory_bytes=candidate.weight_bytes + max(memory) if memory else None,
    )


def _peak_memory(samples: Sequence[Sample]) -> int | None:
    return max((s.peak_memory_bytes for s in samples if s.peak_memory_bytes is not None), default=None)


def _seconds(samples: list[Sample] | str) -> list[float]:
    return [sample.seconds for sample in samples] if isinstance(samples, list) else []


def as_job(run: Run) -> Job:
    """A run as it is timed: features are dropped."""
    return _skipping(lambda: run(()))


def _skipping(action: Callable[[], object], *, compiled: bool = False) -> Callable[[], None]:
    """`action`, raising `Skipped` for lack of memory and, if `compiled`, of a working compiler."""

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
        raise Skipped(reason)

    return job


def attention_lengths(encoder: PackedEncoder, rows: Iterable[int]) -> list[list[int]]:
    """The segments or windows of each layer for images of so many rows, prefix tokens among them; see `flops`."""
    segments = [encoder.example_segments(number) for number in rows]
    attentions: list[Any] = [layer.attention for layer in encoder.layers]
    return [[n for each in segments for n in attention.segments_of(each).lengths] for attention in attentions]


def empty_row(encoder: PackedEncoder, workload: str, candidate: Candidate) -> Row:
    """The row of a candidate that has not run."""
    inputs = candidate.images.workload
    rows = [length + encoder.num_prefix_tokens for length in inputs.lengths]
    return Row(
        workload=workload,
        name=candidate.name,
        capacity=candidate.capacity,
        images=len(inputs.grids),
        tokens=inputs.tokens,
        calls=candidate.calls,
        flops=flops(block_parameters(encoder), encoder.hidden_size, attention_lengths(encoder, rows)),
    )

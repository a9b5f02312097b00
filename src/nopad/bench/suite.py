"""The suite of `nopad bench` without a checkpoint: what a CPU makes of a large and a small model, beside transformers.

Weights are random, and so are pixels. Candidates of a workload have the same weights and images, and their runs are
interleaved.
"""

from __future__ import annotations

import copy
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nopad.bench.baselines import Baseline, one_by_one
from nopad.bench.candidates import Candidate, Images, expected_features, packed
from nopad.bench.load_time import measure_load_time
from nopad.bench.report import Row
from nopad.bench.runner import Job, as_job, checked, empty_row, time_rows, warm_up
from nopad.bench.suite_report import REFERENCE, SuiteReport, SuiteWorkload, format_of
from nopad.bench.timing import PEAK_GEMMS, Skipped, gemm_flops, gemms, timer
from nopad.bench.workloads import Workload, fixed, mixed, small
from nopad.counts import check_count
from nopad.encoder import PackedEncoder
from nopad.environment import device_name, versions
from nopad.inference.compile import needs_compiler
from nopad.inference.defaults import CAPACITY_ON_CPU
from nopad.loading import load

logger = logging.getLogger(__name__)

LARGE = "untrained:apple/aimv2-large-patch14-native"
SMALL = "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"
FLOAT32, BFLOAT16, INT8 = "float32", "bfloat16", "int8"
PEAK_DTYPES = {FLOAT32: torch.float32, BFLOAT16: torch.bfloat16, INT8: torch.float32}
"""The dtype of the GEMMs that a format is compared with; torch has none of int8 that is fast on every processor."""
MIN_RUNS, MAX_RUNS, SECONDS = 3, 9, 10.0
"""Timed runs of a workload: as many as begin within so many seconds, but at least and at most so many."""


@dataclass(frozen=True)
class Entry:
    """Images of one workload through one checkpoint, in one or more formats, the first of them float32."""

    checkpoint: str
    workload: str
    images: int
    formats: tuple[str, ...] = (FLOAT32,)

    def draw(self, patch_size: int, seed: int) -> Workload:
        """The images' sizes."""
        if self.workload == "224":
            return fixed(self.images, 224, patch_size)
        return (mixed if self.workload == "mixed" else small)(self.images, seed)


SUITE = (
    Entry(LARGE, "mixed", 2, (FLOAT32, BFLOAT16, INT8)),
    Entry(SMALL, "mixed", 8),
    Entry(SMALL, "224", 16),
    Entry(SMALL, "small", 64),
)


def bench_suite(
    *,
    runs: int | None = None,
    seed: int = 0,
    entries: Sequence[Entry] | None = None,
    progress: Callable[[str], None] = logger.info,
) -> SuiteReport:
    """Time the packed encoder and transformers' model on a CPU, workload by workload, and how long loading takes.

    On two cores it takes a few minutes.

    Args:
        runs: timed runs of each candidate; by default 3 to 9, as many as begin within 10 seconds a workload.
        seed: seed of sizes and pixels.
        entries: the workloads, `SUITE` unless given.
        progress: called with a line for each step.

    Raises:
        ValueError: an argument out of its range.
    """
    if runs is not None:
        check_count("runs", runs)
    entries = SUITE if entries is None else entries
    workloads, load_time = [], None
    with torch.no_grad():
        for checkpoint in dict.fromkeys(entry.checkpoint for entry in entries):
            progress(f"loading {checkpoint}")
            encoder = load(checkpoint, dtype=torch.float32)
            baseline = Baseline.of(encoder, checkpoint, revision=None, trust_remote_code=False)
            for entry in entries:
                if entry.checkpoint == checkpoint:
                    workloads.append(_run_entry(entry, encoder, baseline, runs, seed, progress))
                    gc.collect()  # compiled copies refer to themselves
            if load_time is None:
                load_time = measure_load_time(encoder, checkpoint, progress)
    assert load_time is not None
    return SuiteReport(device_name("cpu"), versions(), seed, tuple(workloads), load_time)


def _run_entry(
    entry: Entry,
    encoder: PackedEncoder,
    baseline: Baseline,
    runs: int | None,
    seed: int,
    progress: Callable[[str], None],
) -> SuiteWorkload:
    workload, clock = entry.draw(encoder.patch_size, seed), timer(torch.device("cpu"))
    images = Images.of(workload, encoder, seed)
    name = f"{entry.checkpoint}, {workload.name}"
    progress(f"{name}: features to compare with")
    expected = expected_features(encoder, images, checked(len(images.pixels)))
    candidates = list(_candidates(entry, encoder, baseline, images))
    rows: list[Row] = []
    jobs: dict[int, Job] = {}
    for number, (candidate, reason) in enumerate(candidates, 1):
        row = empty_row(encoder, workload.name, candidate)
        progress(f"{name}: preparing {number} of {len(candidates)}: {row.label}")
        try:
            if reason is not None:
                raise Skipped(reason)
            row, run = warm_up(candidate, row, expected, 1, clock)
            jobs[len(rows)] = as_job(run)
        except Skipped as skipped:
            row = row.skip(str(skipped))
        rows.append(row)
    peaks = _peaks([format_of(row) for row in rows])
    time_rows(
        rows,
        [candidate for candidate, _ in candidates],
        jobs,
        peaks,
        timer=clock,
        rounds=range(runs) if runs else _rounds(),
        progress=lambda line: progress(f"{name}: {line}"),
    )
    flops = gemm_flops(*PEAK_GEMMS["cpu"])
    return SuiteWorkload(entry.checkpoint, workload.name, workload.describe(), tuple(rows), flops)


def _peaks(formats: Sequence[str]) -> list[Job]:
    """The GEMMs that each format is compared with."""
    cpu = torch.device("cpu")
    peaks = {dtype: gemms(*PEAK_GEMMS["cpu"], cpu, dtype) for dtype in {PEAK_DTYPES[name] for name in formats}}
    for peak in peaks.values():
        peak()
    return [peaks[PEAK_DTYPES[name]] for name in formats]


def _rounds() -> Iterator[int]:
    """Numbers of rounds, for `SECONDS`."""
    end = time.monotonic() + SECONDS
    for number in range(MAX_RUNS):
        if number >= MIN_RUNS and time.monotonic() >= end:
            return
        yield number


def _candidates(
    entry: Entry, encoder: PackedEncoder, baseline: Baseline, images: Images
) -> Iterator[tuple[Candidate, str | None]]:
    """Each candidate, and the reason where it does not run here."""
    for format in entry.formats:
        twin, inputs, reference = encoder, images, baseline
        if format == BFLOAT16:
            twin, reference = _in_bfloat16(encoder), replace(baseline, model=_in_bfloat16(baseline.model))
            inputs = Images(images.workload, tuple(pixels.to(torch.bfloat16) for pixels in images.pixels))
        reason = None if format != BFLOAT16 or has_fast_bfloat16() else "this processor has no GEMMs in bfloat16"
        precision = INT8 if format == INT8 else None
        compiled = precision is not None or not needs_compiler(twin)
        candidate = packed(twin, inputs, CAPACITY_ON_CPU, compiled=compiled, precision=precision)
        yield replace(candidate, name=f"nopad, {format}"), reason
        if precision is None:
            yield replace(one_by_one(twin, reference, inputs), name=f"{REFERENCE}, {format}"), reason


def _in_bfloat16(model: Any) -> Any:
    return None if model is None else copy.deepcopy(model).to(torch.bfloat16)


def has_fast_bfloat16() -> bool:
    """Whether this processor has instructions for products in bfloat16 (AVX512-BF16 or AMX)."""
    cpu: Any = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()

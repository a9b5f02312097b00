"""Seconds, bytes and floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch


class Skipped(Exception):  # noqa: N818 - a result, not an error
    """A candidate cannot run here; the message is the reason."""


class Sample(NamedTuple):
    """One run: seconds, and the most bytes allocated beyond those allocated before it, `None` if unavailable."""

    seconds: float
    peak_memory_bytes: int | None


PEAK_GEMMS = {"cuda": (8192, 100), "cpu": (2048, 1)}
"""Side of the square matrices, and GEMMs per run, that measure the peak, by device type. A GPU's clock falls under
load, so one run there lasts long enough to show it."""

Timer = Callable[[Callable[[], object]], Sample]


def timer(device: torch.device) -> Timer:
    """Times one run on `device`: by CUDA events on an idle GPU, else by the clock."""
    return _time_cuda if device.type == "cuda" else _time_host


def _time_host(run: Callable[[], object]) -> Sample:
    start = time.perf_counter()
    run()
    return Sample(time.perf_counter() - start, None)


def _time_cuda(run: Callable[[], object]) -> Sample:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return Sample(start.elapsed_time(stop) / 1e3, torch.cuda.max_memory_allocated() - before)


def flops(block_parameters: int, hidden_size: int, lengths: Sequence[Sequence[int]]) -> int:
    """Floating-point operations of a forward, a multiplication and an addition counted as two.

    `2 · parameters of the blocks · tokens` for the GEMMs, and for the two products of attention `4 · D · Σ length²` of
    each layer. Embedding, final norm and pooling do not count.

    Args:
        block_parameters: number of parameters of all transformer blocks.
        hidden_size: D, heads times head size.
        lengths: for each block the tokens of each segment or window, prefix tokens included.
    """
    tokens = sum(lengths[0]) if lengths else 0
    return 2 * block_parameters * tokens + 4 * hidden_size * sum(length**2 for each in lengths for length in each)


def gemm_flops(side: int, count: int) -> int:
    """Floating-point operations of a job of `gemms`."""
    return 2 * side**3 * count


def gemms(side: int, count: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A job of `count` GEMMs of the same two `(side, side)` matrices of normal numbers."""
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float32, "device": device, "generator": generator}
    left, right = (torch.randn(side, side, **options).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(count):
            torch.mm(left, right, out=out)

    return multiply


def interleave(
    timer: Timer,
    jobs: Sequence[Callable[[], object]],
    rounds: Iterable[int],
    on_start: Callable[[int, int], None] = lambda run, job: None,
) -> list[list[Sample] | str]:
    """Time every job once in each round, so that the machine's drift affects all of them alike.

    Args:
        timer: times one run.
        jobs: what is timed.
        rounds: numbers of the rounds; drawn one by one, so that they can end by the clock.
        on_start: called before each run with the number of its round and the index of its job.

    Returns:
        The samples of each job, or the reason of the `Skipped` that it raised.
    """
    results: list[list[Sample] | str] = [[] for _ in jobs]
    for run in rounds:
        for number, job in enumerate(jobs):
            samples = results[number]
            if isinstance(samples, list):
                on_start(run, number)
                try:
                    samples.append(timer(job))
                except Skipped as reason:
                    results[number] = str(reason)
    return results

"""Seconds, bytes and floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class NotRun(Exception):  # noqa: N818 - it is an answer
    """A contestant cannot run here, and why."""


class Sample(NamedTuple):
    """One run: seconds, and bytes allocated at its peak beyond those allocated before, `None` where nobody knows."""

    seconds: float
    peak_bytes: int | None


CEILING = {"cuda": (8192, 100), "cpu": (2048, 1)}
"""Side of the ceiling's matrices and products in a run: on a GPU, whose clock falls under load, enough to feel it."""

Meter = Callable[[Callable[[], object]], Sample]


def meter(device: torch.device) -> Meter:
    """How a run is measured on `device`: by CUDA events on an idle GPU, else by the clock."""
    return _measure_cuda if device.type == "cuda" else _measure_host


def _measure_host(run: Callable[[], object]) -> Sample:
    start = time.perf_counter()
    run()
    return Sample(time.perf_counter() - start, None)


def _measure_cuda(run: Callable[[], object]) -> Sample:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return Sample(start.elapsed_time(stop) / 1e3, torch.cuda.max_memory_allocated() - before)


def flops(block_parameters: int, layers: int, hidden_size: int, lengths: Sequence[int]) -> int:
    """Floating-point operations of a forward, as docs/performance.md counts them.

    `2 · parameters of the blocks · tokens` for their matrices and `4 · layers · D · Σ length²` for the two products of
    attention, a multiplication and an addition counted as two; embedding, final norm and pooling not at all.

    Args:
        block_parameters: of all transformer blocks together.
        layers: transformer blocks.
        hidden_size: D, heads times head size.
        lengths: tokens of each segment, prefix tokens included.
    """
    return 2 * block_parameters * sum(lengths) + 4 * layers * hidden_size * sum(length**2 for length in lengths)


def multiplying(side: int, products: int, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """The ceiling's job: `products` times the product of the same two `(side, side)` matrices of normal numbers."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=product)

    return multiply


def in_turn(measure: Meter, jobs: Sequence[Callable[[], object]], runs: int) -> list[list[Sample] | str]:
    """Every job `runs` times, one of each in turn, so that the machine's drift hits all alike.

    Returns:
        The samples of each job, or the reason of the `NotRun` that it raised.
    """
    results: list[list[Sample] | str] = [[] for _ in jobs]
    for _ in range(runs):
        for number, job in enumerate(jobs):
            samples = results[number]
            if isinstance(samples, list):
                try:
                    samples.append(measure(job))
                except NotRun as reason:
                    results[number] = str(reason)
    return results

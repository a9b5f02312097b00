"""Progress of a job: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from nopad.counts import counted
from nopad.pipeline.stats import Stats
from nopad.terminal import message_lines

LINE_INTERVAL_SECONDS = 10.0
"""Interval between two plain lines."""

MIN_ESTIMATE_SECONDS = 60.0
"""Shorter runs get no estimate of their duration; the time left is always shown."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run; counts are of this run.

    Attributes:
        rows: images that this run has to do; where it has whole tars an estimate, 0 where nothing is known.
        rows_before: rows that earlier runs have made.
        stats: what is done.
        seconds: since the first input was read.
        mean_patches: patches of an input on average, by the headers of a few; `None` if unknown.
        tars: whole tars that it has to do, in words; empty once all images in them are known.
    """

    rows: int
    rows_before: int
    stats: Stats
    seconds: float
    mean_patches: float | None = None
    tars: str = ""

    def describe_rows(self) -> str:
        """What the run has to do."""
        if not self.tars:
            return counted(self.rows, "image")
        return f"about {counted(self.rows, 'image')}" if self.rows else self.tars


class Display:
    """Prints messages and progress to a stream: a line at the beginning, at intervals and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.estimate = Estimate()
        self.next = 0.0
        self.was_over = False

    def message(self, text: str) -> None:
        """Print a line."""
        with suppress(OSError):  # a log that cannot be written must not end the job
            print(message_lines(text), file=self.stream, flush=True)

    def report(self, progress: Progress) -> None:
        """Print what is new."""
        for line in self.estimate.lines(progress):
            self.message(line)
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """Print how far the run is, if it is time."""
        is_over = progress.stats.images == progress.rows and not progress.tars
        if (is_over and not self.was_over) or (not is_over and time.monotonic() >= self.next):
            self.next = time.monotonic() + LINE_INTERVAL_SECONDS
            self.was_over = is_over
            before = f" (and {progress.rows_before:,} from before)" if progress.rows_before else ""
            done = f"{progress.stats.images:,} of {progress.describe_rows()}{before}"
            self.message(f"{done} · {describe(progress)}")


class _Bar(Display):
    """A bar of rich, with messages above it."""

    def __init__(self, stream: TextIO, bar: Any) -> None:
        super().__init__(stream)
        self.bar = bar
        self.task = bar.add_task("", total=None)

    def message(self, text: str) -> None:
        with suppress(OSError):
            self.bar.console.print(message_lines(text), markup=False, highlight=False, soft_wrap=True)

    def update(self, progress: Progress) -> None:
        total = progress.rows + progress.rows_before if progress.rows else None
        completed = progress.stats.images + progress.rows_before
        self.bar.update(self.task, total=total, completed=completed, description=describe(progress))


@contextmanager
def display(stream: TextIO) -> Iterator[Display]:
    """A display of messages and progress: a bar on a terminal, with messages above it; lines elsewhere."""
    if not stream.isatty():
        yield Display(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with RichProgress(*columns, console=Console(file=stream)) as bar:
        yield _Bar(stream, bar)


class Estimate:
    """Lines with the size and the estimated duration of a run: one before the first pack, one after a few."""

    def __init__(self) -> None:
        self.is_introduced = self.is_over = False
        self.first: tuple[float, int, int] | None = None  # seconds, packs and work done at the first pack

    def lines(self, progress: Progress) -> Iterator[str]:
        """The lines that can be printed now and were not before."""
        mean, stats = progress.mean_patches, progress.stats
        inputs = progress.describe_rows() + (f", about {mean:,.0f} patches each" if mean else "")
        if not self.is_introduced:
            self.is_introduced = True
            yield inputs
        if self.is_over or not stats.packs or not progress.rows:
            return
        work = stats.patches if mean else stats.images
        if self.first is None:
            self.first = progress.seconds, stats.packs, work
            return
        seconds, packs = progress.seconds - self.first[0], stats.packs - self.first[1]
        if work > self.first[2] and (packs >= 4 or seconds >= 5):
            self.is_over = True
            rate = (work - self.first[2]) / seconds
            total = progress.seconds + max(0.0, progress.rows * (mean or 1.0) - work) / rate
            if total >= MIN_ESTIMATE_SECONDS:
                speed = f"{rate:,.0f} patches/s" if mean else f"{rate:,.1f} images/s"
                yield f"{inputs}: {duration(total)} at {speed}"


def describe(progress: Progress) -> str:
    """Rates, fill, failures and the time left."""
    stats, seconds = progress.stats, max(progress.seconds, 1e-9)
    rate = stats.images / seconds
    left = clock(max(0, progress.rows - stats.images) / rate) if stats.images and progress.rows else "?"
    return (
        f"{rate:,.1f} images/s · {stats.patches / seconds:,.0f} tokens/s · fill {stats.fill:.0%} · "
        f"{stats.failed:,} failed · {left} left"
    )


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two: `40 s`, `12 min`, `14 h`, `3 days`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class Ticker:
    """Calls `report` a few times a second from a thread of its own, and once more at the end."""

    def __init__(self, report: Callable[[], None]) -> None:
        self.report = report
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.tick, name="nopad-progress", daemon=True)

    def tick(self) -> None:
        while not self.over.wait(0.25):
            self.report()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.report()

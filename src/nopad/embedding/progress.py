"""How far a job is: a bar where a person looks on, plain lines where a log is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

from nopad.pipeline.stats import Stats

LINE_EVERY = 10.0
"""Seconds between two plain lines."""


@dataclass(frozen=True)
class Progress:
    """How far a run is; counts are of this run.

    Attributes:
        rows: inputs that this run has to do.
        kept: rows that earlier runs left.
        stats: what is done.
        seconds: since the first input was read.
    """

    rows: int
    kept: int
    stats: Stats
    seconds: float


@contextmanager
def display(stream: TextIO) -> Iterator[Callable[[Progress], None]]:
    """Something to tell progress to: it draws a bar on a terminal, elsewhere it prints a line now and then."""
    if not stream.isatty():
        yield Lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
    with RichProgress(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task("loading", total=None)

        def show(progress: Progress) -> None:
            total, completed = progress.rows + progress.kept, progress.stats.images + progress.kept
            bar.update(task, total=total, completed=completed, description=describe(progress))

        yield show


def describe(progress: Progress) -> str:
    """Rates, fill, failures and the time left."""
    stats, seconds = progress.stats, max(progress.seconds, 1e-9)
    rate = stats.images / seconds
    left = clock((progress.rows - stats.images) / rate) if stats.images else "?"
    return (
        f"{rate:,.1f} images/s · {stats.patches / seconds:,.0f} tokens/s · fill {stats.fill:.0%} · "
        f"{stats.failed:,} failed · {left} left"
    )


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}"


class Lines:
    """A line at the beginning, every `LINE_EVERY` seconds and when all is done."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.next = 0.0
        self.was_over = False

    def __call__(self, progress: Progress) -> None:
        is_over = progress.stats.images == progress.rows
        if (is_over and not self.was_over) or (not is_over and time.monotonic() >= self.next):
            self.next = time.monotonic() + LINE_EVERY
            self.was_over = is_over
            kept = f" (and {progress.kept:,} from before)" if progress.kept else ""
            line = f"{progress.stats.images:,} of {progress.rows:,} images{kept} · {describe(progress)}"
            with suppress(OSError):  # a log that cannot be written must not end the job
                print(line, file=self.stream, flush=True)


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

"""How far a job is: a bar where a person looks on, plain lines where a log is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from nopad.embedding.job import Progress

LINE_EVERY = 10.0
"""Seconds between two plain lines."""


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
            total, completed = progress.rows + progress.kept, progress.tally.images + progress.kept
            bar.update(task, total=total, completed=completed, description=describe(progress))

        yield show


def describe(progress: Progress) -> str:
    """Rates, fill, failures and the time left."""
    tally, seconds = progress.tally, max(progress.seconds, 1e-9)
    rate = tally.images / seconds
    left = clock((progress.rows - tally.images) / rate) if tally.images else "?"
    return (
        f"{rate:,.1f} images/s · {tally.patches / seconds:,.0f} tokens/s · fill {tally.fill:.0%} · "
        f"{tally.failed:,} failed · {left} left"
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
        is_over = progress.tally.images == progress.rows
        if (is_over and not self.was_over) or (not is_over and time.monotonic() >= self.next):
            self.next = time.monotonic() + LINE_EVERY
            self.was_over = is_over
            kept = f" (and {progress.kept:,} from before)" if progress.kept else ""
            line = f"{progress.tally.images:,} of {progress.rows:,} images{kept} · {describe(progress)}"
            with suppress(OSError):  # a log that cannot be written must not end the job
                print(line, file=self.stream, flush=True)

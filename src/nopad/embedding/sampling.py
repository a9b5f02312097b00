"""A sample of a job's inputs, embedded into a folder that is removed again, and how fast a job goes by it."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from nopad.embedding.borders import Borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.in_process import InProcess
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.sources import Listing
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, Found, expanded
from nopad.embedding.job import NewJob, begin_or_resume, kept_columns
from nopad.embedding.lock import FolderLock
from nopad.embedding.progress import Progress
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.summary import MIN_BUSY, Summary
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.reader import failed_rows

SAMPLE = 512
"""Inputs that are embedded unless their number is given."""

MIN_SECONDS = 8.0
"""Where these take less time, more are: speeds over a shorter time vary too much."""

_MAX_SAMPLE = 32 * SAMPLE
_RUN = 8  # neighbours in a tar or table, of which one costs as much to read as a few


@dataclass(frozen=True)
class Sample:
    """What became of a sample.

    Attributes:
        inputs: those that were embedded.
        num_images: that there are, an estimate where whole tars were sampled.
        summary: of their job, with counts and seconds.
        failures: reasons and how many inputs have each, the most frequent first.
        num_bytes: of its table.
        per_second: images, as a long job goes on.
        start_seconds: until the decode processes ran and the pipeline was full, and to end.
    """

    inputs: InputList
    num_images: int
    summary: Summary
    failures: dict[str, int]
    num_bytes: int
    per_second: float
    start_seconds: float


def take_sample(listing: Listing, number: int | None, maker: InProcess, settings: Settings, names: list[str]) -> Sample:
    """Embed a sample of what is listed.

    Args:
        number: of inputs at most; `None` for `SAMPLE`, or more where these take less than `MIN_SECONDS`.
        settings: of the job.
        names: of the sources.

    Raises:
        ValueError, OSError, ImportError: as `nopad.embed`.
    """
    sample = _embedded(listing, number or SAMPLE, maker, settings, names)
    if number is None and sample.summary.seconds < MIN_SECONDS and len(sample.inputs) < sample.num_images:
        first, more = sample, min(_MAX_SAMPLE, round(MIN_SECONDS * sample.per_second))
        sample = _embedded(listing, max(more, SAMPLE), maker, settings, names)
        # The processes were there already: only the first has waited for them.
        start_seconds = _start_seconds(first.summary, sample.per_second)
        sample = replace(sample, start_seconds=max(sample.start_seconds, start_seconds))
    return sample


def _start_seconds(summary: Summary, per_second: float) -> float:
    return max(0.0, summary.seconds - summary.done / per_second)


def sample_places(number: int, sample: int) -> list[int]:
    """Indices all over a list, in runs of neighbours."""
    if number <= sample:
        return list(range(number))
    runs = max(1, sample // _RUN)
    starts = [run * number // runs for run in range(runs)]
    return sorted({place for start in starts for place in range(start, min(number, start + _RUN))})[:sample]


def _chosen(listing: Listing, number: int, timeout: float | None) -> tuple[InputList, int]:
    """Inputs from all over a list, of whole tars their first images, and how many images there are by these."""
    tars, inputs = listing.whole_tars, listing.inputs
    if not tars:
        return InputList.of(inputs[place] for place in sample_places(len(inputs), number)), len(inputs)
    in_tars = min(number, -(-number * int(tars.num_images(len(tars))) // listing.num_images))
    num_tars = min(len(tars), max(1, in_tars // _RUN))
    found = Found()
    chosen: list[Input] = []
    for place in sample_places(len(tars), num_tars):
        item = inputs[int(tars.places[place])]
        with closing(expanded([item], timeout, found)) as images:
            chosen += islice(images, -(-in_tars // num_tars))
    others = (inputs[place] for place in sample_places(len(inputs), number - in_tars))
    chosen += [item for item in others if item.kind != WHOLE_TAR]
    per_image = max(1.0, found.bytes / max(1, found.images))
    return InputList.of(chosen[:number]), len(inputs) - len(tars) + round(tars.num_bytes / per_image)


def _embedded(listing: Listing, number: int, maker: InProcess, settings: Settings, names: list[str]) -> Sample:
    chosen, num_images = _chosen(listing, number, settings.input_timeout)
    times: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(prefix="nopad-plan-") as name, FolderLock(folder := Path(name)) as lock:
        record = {**maker.encoder.record, "sources": json.dumps(names), "inputs": chosen.digest()}
        manifest, borders = Manifest(folder), Borders.every(settings.rows_per_shard[0], len(chosen))
        new = NewJob(chosen, borders, StampSpool.of(chosen, contents=False), kept_columns(settings, chosen))
        (job,) = begin_or_resume(JobFolder(folder), lock.check, settings, record, new, manifest)
        counts = maker.new_counts()
        before = replace(counts.stats)

        def note(progress: Progress) -> None:
            times.append((progress.seconds, progress.stats.images - before.images))

        run = Run(job, counts, manifest, progress=note)
        maker.work(run)
        paths = job.finished().values()
        failures = Counter(error for path in paths for *_, error in failed_rows(path))
        written = sum(path.stat().st_size for path in paths)
        summary = replace(run.summary({}, []), stats=counts.stats.since(before))
    per_second = rate(summary, times)
    start_seconds = _start_seconds(summary, per_second)
    return Sample(chosen, num_images, summary, dict(failures.most_common()), written, per_second, start_seconds)


def rate(summary: Summary, times: Sequence[tuple[float, int]]) -> float:
    """Images per second of a job that goes on as a short one did.

    The stage that works longest for an image sets the pace, unless it worked for less than half of the time: then
    something else does that has no clock of its own, as a store that is slow, and what came out counts.

    Args:
        summary: of the short job.
        times: seconds, and images that were done by then.
    """
    number, stats = max(1, summary.done), summary.stats
    seconds = max(stats.decode_seconds / summary.decode_processes, stats.device_seconds, summary.write_seconds, 1e-9)
    first, done = next(((at, images) for at, images in times if images), (0.0, 0))
    if done == number:  # too short to leave anything out
        first, done = 0.0, 0
    lasted = max(summary.seconds - first, 1e-9)
    if seconds / max(summary.seconds, 1e-9) >= MIN_BUSY:
        return number / seconds
    return min(number / seconds, (number - done) / lasted)

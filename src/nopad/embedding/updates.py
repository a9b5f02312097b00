"""A table that grows: what is new in the sources becomes a job beside the first, what is gone or changed is marked."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.kept import Kept
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.stamps import Stamp, load_stamps, stamps_in, stamps_table, take_stamps
from nopad.embedding.job import FeatureSizes, Job
from nopad.embedding.table.format import CHANGED, GONE, Row
from nopad.embedding.table.reader import iterate_rows, statuses


@dataclass(frozen=True, slots=True)
class Place:
    """A row of a table: of which job, in which shard, and where in it."""

    job: int
    shard: int
    row: int


@dataclass(frozen=True)
class Difference:
    """The difference between a table and its sources.

    Attributes:
        new: inputs to embed, those that have changed among them, and their stamps.
        marks: rows whose input is gone or has changed.
    """

    new: list[tuple[Input, Stamp]]
    marks: dict[Place, str]

    def describe(self) -> list[str]:
        """The changes in words, for a summary."""
        counts = Counter(self.marks.values())
        new = len(self.new) - counts[CHANGED]
        if not self.new and not self.marks:
            return ["nothing has changed in the sources"]
        return [f"in the sources {new:,} are new, {counts[CHANGED]:,} have changed, {counts[GONE]:,} are gone"]


def compare(jobs: Sequence[Job], listed: InputList, names: Collection[str], *, contents: bool) -> Difference:
    """The difference between a table, all of whose shards are there, and its sources.

    Inputs are the same if their source and name are, their place in it, and their file: by size and time or, where both
    are known, by its contents. Of sources that are not among `names` nothing is gone.
    """
    stamps = (stamp for table in take_stamps(listed, contents=contents) for stamp in stamps_in(table))
    current, stamps_of = _current(jobs)
    new, marks = [], {}
    for item, stamp in zip(listed, stamps, strict=True):
        places = current.get((item.source, item.id))
        if not places:
            new.append((item, stamp))
            continue
        place, before = places.pop(0)
        old = stamps_of[place]
        if before != item or (old is not None and old.differs(stamp)):
            marks[place] = CHANGED
            new.append((item, stamp))
    sources = {item.source for item in listed}
    whole = {number for number, job in enumerate(jobs) if {*json.loads(job.record["sources"])} <= {*names}}
    for (source, _), places in current.items():
        for place, _ in places:
            if place.job in whole or source in sources or any(_is_below(source, name) for name in names):
                marks[place] = GONE
    return Difference(new, marks)


def _is_below(source: str, name: str) -> bool:
    return source == name or source.startswith(name.rstrip("/") + "/")


def _current(
    jobs: Sequence[Job],
) -> tuple[dict[tuple[str, str], list[tuple[Place, Input]]], dict[Place, Stamp | None]]:
    """The rows that are not marked by source and name, and their stamps."""
    rows: dict[tuple[str, str], list[tuple[Place, Input]]] = defaultdict(list)
    stamps_of: dict[Place, Stamp | None] = {}
    for number, job in enumerate(jobs):
        stamps = load_stamps(job.folder.stamps_file(job.record["inputs"]), len(job.inputs))
        size = job.settings.rows_per_shard
        for shard in range(len(job)):
            row_statuses = statuses(job.path(shard))
            for row, (item, status) in enumerate(zip(job.of(shard), row_statuses, strict=True)):
                if status in (GONE, CHANGED):
                    continue
                place = Place(number, shard, row)
                rows[item.source, item.id].append((place, item))
                stamps_of[place] = None if stamps is None else stamps[shard * size + row]
    return rows, stamps_of


def begin_update(folder: JobFolder, jobs: Sequence[Job], record: Mapping[str, str], difference: Difference) -> Job:
    """Begin the job of what is new, after `mark`: where that was interrupted, what is not marked yet is found again.

    Raises:
        OSError: the folder cannot be written.
    """
    first = jobs[0]
    number = 1 + max(each.update for each in folder.all())
    inputs = InputList.of(item for item, _ in difference.new)
    update_record = {**record, "inputs": inputs.digest(), "table": first.fingerprint, "update": str(number)}
    if "columns" in first.record:
        update_record["columns"] = first.record["columns"]
    part = JobFolder(folder.path, number)
    part.begin(update_record, inputs, [stamps_table([stamp for _, stamp in difference.new])], first.check_lock)
    return Job(first.settings, part, update_record, inputs, first.check_lock)


def mark(jobs: Sequence[Job], marks: Mapping[Place, str], sizes: FeatureSizes) -> None:
    """Put marks into the shards that need them, each replaced as a whole; a marked row has neither features nor what
    was found in its file.

    Raises:
        LostLockError, OSError: see `Job.write`.
    """
    by_shard: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
    for place, status in marks.items():
        by_shard[place.job, place.shard][place.row] = status
    for (number, shard), marked in by_shard.items():
        job = jobs[number]
        rows = [_marked(row, marked.get(at), job.kept) for at, row in enumerate(iterate_rows(job.path(shard)))]
        job.write(shard, rows, sizes)


def _marked(row: Row, status: str | None, kept: Kept | None) -> Row:
    if status is None:
        return row
    return Row(row.id, row.source, status, kept=row.kept if kept is None else kept.without_extras(row.kept))

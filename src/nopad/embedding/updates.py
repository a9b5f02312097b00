"""A table that grows: what is new in the sources becomes a job beside the first, what is gone or changed is marked."""

from __future__ import annotations

import json
from array import array
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from nopad.embedding.borders import Borders, with_borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.kept import Kept
from nopad.embedding.inputs.listing import Input, InputWriter, inputs_in
from nopad.embedding.inputs.parts import num_parts, parts_by_name
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import Listing
from nopad.embedding.inputs.stamps import Stamp, StampSpool, no_stamps, saved_stamps, stamps_in, take_stamps
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, without_time
from nopad.embedding.job import FeatureSizes, Job
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.format import CHANGED, GONE, Row
from nopad.embedding.table.reader import iterate_rows, names, statuses
from nopad.local_paths import name_text
from nopad.preprocessing.files import as_text

_ROW = ("job", "shard", "row")


@dataclass(frozen=True)
class Difference:
    """The difference between a table and its sources.

    Attributes:
        listed: the sources.
        stamps: theirs.
        new: places in `listed` of those to embed, in order; those that have changed are among them.
        marks: `(N, 4)`: job, shard and row of what is gone or has changed, and 1 for changed; in order.
    """

    listed: Listing
    stamps: StampSpool
    new: np.ndarray
    marks: np.ndarray

    def describe(self) -> list[str]:
        """The changes in words, for a summary."""
        changed = int(self.marks[:, 3].sum())
        new, gone = len(self.new) - changed, len(self.marks) - changed
        if not len(self.new) and not len(self.marks):
            return ["nothing has changed in the sources"]
        return [f"in the sources {new:,} are new, {changed:,} have changed, {gone:,} are gone"]

    def of_new(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The rows of new inputs among those of all that are listed."""
        first = 0
        for table in tables:
            start, stop = np.searchsorted(self.new, (first, first + len(table)))
            yield table.take(self.new[start:stop] - first)
            first += len(table)


def compare(
    jobs: Sequence[Job], listing: Listing, names: Collection[str], manifest: Manifest, *, contents: bool
) -> Difference:
    """The difference between a table, all of whose shards are there, and its sources.

    Inputs are the same if their source and name are, their place in it, and their file: by size and time or, where both
    are known, by its contents. Of sources that are not among `names` nothing is gone.
    """
    spool, sources, listed = StampSpool(), set[str](), listing.inputs

    def listed_rows() -> Iterator[pa.Table]:
        first = 0
        for table, stamps in zip(listed.tables(), take_stamps(listed, contents=contents), strict=True):
            spool.add(stamps)
            sources.update(table["source"].unique().to_pylist())
            yield _beside(table, stamps).append_column("place", pa.array(np.arange(first, first + len(table))))
            first += len(table)

    number = num_parts(len(listed), *(len(job.inputs) for job in jobs))
    texts = {*map(name_text, names)}
    whole = {index for index, job in enumerate(jobs) if {*json.loads(job.record["sources"])} <= texts}
    names = [*map(as_text, names)]
    new, marks = array("q"), [np.empty((0, 4), np.int64)]
    # All that is listed is read, and `sources` complete, before the first part is compared.
    for now, before in zip(
        parts_by_name(listed_rows(), number), parts_by_name(_current(jobs, manifest), number), strict=True
    ):
        rows: dict[tuple[str, str], deque[tuple[Input, Stamp, tuple[int, ...]]]] = defaultdict(deque)
        for row in _rows(before, _ROW):
            rows[row[0].source, row[0].id].append(row)
        of_part = []
        for item, stamp, (place,) in _rows(now, ("place",)):
            if not (there := rows.get((item.source, item.id))):
                new.append(place)
                continue
            old, old_stamp, at = there.popleft()
            if without_time(old) != without_time(item) or (old_stamp.mtime_ns is not None and old_stamp.differs(stamp)):
                of_part.append((*at, 1))
                new.append(place)
        for (source, _), there in rows.items():
            is_named = source in sources or any(_is_below(source, name) for name in names)
            of_part += [(*at, 0) for _, _, at in there if is_named or at[0] in whole]
        marks.append(np.array(of_part, np.int64).reshape(-1, 4))
    every = np.concatenate(marks)
    return Difference(listing, spool, np.sort(np.array(new, np.int64)), every[np.lexsort(every.T[::-1])])


def _is_below(source: str, name: str) -> bool:
    return source == name or source.startswith(name.rstrip("/") + "/")


def _current(jobs: Sequence[Job], manifest: Manifest) -> Iterator[pa.Table]:
    """The rows of jobs that are not marked, and their stamps, null where they are not known."""
    for number, job in enumerate(jobs):
        sizes = map(len, job.borders)
        of_shards = saved_stamps(job.folder.stamps_file(job.record["inputs"]), len(job.inputs), sizes)
        for shard, places in enumerate(job.borders):
            table = pa.concat_tables(job.inputs.tables(places.start, places.stop))
            stamps = no_stamps(len(table)) if of_shards is None else next(of_shards)
            count = manifest.count(job.path(shard))
            is_marked = count.rows != count.ok + count.failed  # else it need not be opened
            marked = _is_marked(job, shard) if is_marked else np.zeros(len(table), bool)
            rows = np.arange(len(table))
            columns = (np.full(len(table), number), np.full(len(table), shard), rows)
            yield _beside(table, stamps, **dict(zip(_ROW, columns, strict=True))).take(rows[~marked])


def _is_marked(job: Job, shard: int) -> np.ndarray:
    """Which inputs of a shard are marked; of a whole tar all rows are, or none."""
    rows = np.isin(statuses(job.path(shard)), (GONE, CHANGED))
    return np.array([rows[each.start] for each in rows_of_inputs(job, shard)]) if job.tars(shard) else rows


def rows_of_inputs(job: Job, shard: int) -> list[range]:
    """The rows of each input of a shard that is there. Those of a whole tar follow each other and name it as their
    source; what is listed twice in a row has the same number of rows each time."""
    places = job.borders[shard]
    items = job.inputs[places.start : places.stop]
    sources = [source for source, *_ in names(job.path(shard))]
    rows, end = list[range](), 0
    for source, group in groupby(items, key=lambda item: item.source):
        start, of_source = end, [*group]
        while end < len(sources) and sources[end] == source:
            end += 1
        tars = sum(item.kind == WHOLE_TAR for item in of_source)
        length = (end - start - len(of_source) + tars) // max(1, tars)
        for item in of_source:
            rows.append(range(start, start := start + (length if item.kind == WHOLE_TAR else 1)))
    return rows


def _beside(table: pa.Table, stamps: pa.Table, **columns: np.ndarray) -> pa.Table:
    for name in stamps.column_names:
        table = table.append_column(f"stamp_{name}", stamps[name])
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    return table


def _rows(table: pa.Table | None, places: Sequence[str]) -> Iterator[tuple[Input, Stamp, tuple[int, ...]]]:
    if table is None:
        return
    stamps = table.select([name for name in table.column_names if name.startswith("stamp_")])
    columns = (table[name].to_pylist() for name in places)
    items = inputs_in(table.drop_columns([*stamps.column_names, *places]))
    yield from zip(items, stamps_in(stamps), zip(*columns, strict=True), strict=True)


def begin_update(
    folder: JobFolder, jobs: Sequence[Job], record: Mapping[str, str], difference: Difference, *, by_bytes: bool
) -> Job:
    """Begin the job of what is new, after `mark`: where that was interrupted, what is not marked yet is found again.

    Args:
        by_bytes: shards end by the bytes of the sources as well.

    Raises:
        OSError: the folder cannot be written.
    """
    first = jobs[0]
    number = 1 + max(each.update for each in folder.all())
    with InputWriter() as writer:
        for table in difference.of_new(difference.listed.inputs.tables()):
            writer.add_table(table)
        inputs = writer.finish()
    units = np.searchsorted(difference.new, difference.listed.units)
    stamps = StampSpool()
    for table in difference.of_new(difference.stamps.tables()):
        stamps.add(table)
    sizes = SourceBytes.of(inputs, stamps) if by_bytes else None
    whole_tars = difference.listed.whole_tars.among(difference.new)
    borders = Borders.at_units(units, first.settings.rows_per_shard, len(inputs), sizes, whole_tars)
    update_record = {**record, "inputs": inputs.digest(), "table": first.fingerprint, "update": str(number)}
    update_record = with_borders(update_record, borders, len(inputs), whole_tars)
    if "columns" in first.record:
        update_record["columns"] = first.record["columns"]
    part = JobFolder(folder.path, number)
    part.begin(update_record, inputs, borders, stamps.tables(), first.check_lock)
    return Job(first.settings, part, update_record, inputs, borders, first.check_lock)


def mark(jobs: Sequence[Job], marks: np.ndarray, sizes: FeatureSizes) -> None:
    """Put marks into the shards that need them, each replaced as a whole; a marked row has neither features nor what
    was found in its file.

    Args:
        marks: see `Difference`.

    Raises:
        LostLockError, OSError: see `Job.new_shard`.
    """
    starts = np.flatnonzero(np.diff(marks[:, :2], axis=0, prepend=-1).any(axis=1))
    for of_shard in np.split(marks, starts[1:]) if len(marks) else ():
        job, shard = jobs[of_shard[0, 0]], int(of_shard[0, 1])
        marked = {row: CHANGED if is_changed else GONE for row, is_changed in of_shard[:, 2:].tolist()}
        if job.tars(shard):
            of_inputs = rows_of_inputs(job, shard)
            marked = {row: status for place, status in marked.items() for row in of_inputs[place]}
        with job.new_shard(shard, sizes) as new:
            new.add(_marked(row, marked.get(at), job.kept) for at, row in enumerate(iterate_rows(job.path(shard))))
            new.finish()


def _marked(row: Row, status: str | None, kept: Kept | None) -> Row:
    if status is None:
        return row
    return Row(row.id, row.source, status, kept=row.kept if kept is None else kept.without_extras(row.kept))

"""The bulk job: sources to a folder of Parquet shards, finished shards kept whatever happens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.listing import Input, InputList, as_text
from nopad.embedding.manifest import check_same, fingerprint, record_of
from nopad.embedding.settings import Settings
from nopad.embedding.table.writer import Row, parse_shard_name, shard_name, write_shard
from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A job that was begun in a folder: what each shard holds, which are there, how to make the others."""

    settings: Settings
    files: JobFolder
    record: Mapping[str, str]
    inputs: InputList
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.record)

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.settings.rows_per_shard)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.files.folder / shard_name(shard, len(self), self.fingerprint)

    def of(self, shard: int) -> list[Input]:
        """The inputs of a shard."""
        size = self.settings.rows_per_shard
        return self.inputs[shard * size : (shard + 1) * size]

    def size(self, shard: int) -> int:
        """How many inputs a shard has."""
        size = self.settings.rows_per_shard
        return min(size, len(self.inputs) - shard * size)

    def finished(self) -> list[int]:
        """Numbers of the shards that are there.

        Raises:
            ValueError: a shard of another job.
        """
        found = []
        for path in sorted(self.files.folder.glob("shard-*.parquet")):
            parsed = parse_shard_name(path.name)
            if parsed is None or parsed[1:] != (len(self), self.fingerprint):
                raise ValueError(f"{path}: not a shard of this job; move it away or use another folder")
            found.append(parsed[0])
        return found

    def write(self, shard: int, rows: Sequence[Row], encoder: PackedEncoder) -> None:
        """Put a shard in its place, whole."""
        path = self.path(shard)
        metadata = {key: value for key, value in self.record.items() if key != "sources"}
        write_shard(path, rows, self.settings.format(encoder), metadata, temporary=self.files.temporary(path))


def begin_or_resume(
    files: JobFolder, settings: Settings, encoder: PackedEncoder, sources: list[str], inputs: InputList
) -> tuple[Job, list[str]]:
    """The job of this folder, and what has changed in its sources; a job's list is the one that it was begun with."""
    record = record_of(settings, encoder, sources, inputs)
    if not files.has_job:
        job = Job(settings, files, record, inputs)
        job.finished()  # refuses shards of another job before anything is written
        files.begin(record, inputs)
        return job, []
    begun, kept = files.read()
    check_same(begun, record, files.folder)
    changes = [] if begun["inputs"] == record["inputs"] else [_changes(kept, inputs, files.folder)]
    for change in changes:
        logger.warning(change)
    return Job(settings, files, begun, kept), changes


def _changes(kept: InputList, listed: InputList, folder: Path) -> str:
    """How the sources have changed since the job began.

    Raises:
        ValueError: inputs that are elsewhere now; their old places may hold anything.
    """
    before, now = Counter(kept), Counter(listed)
    new, gone = now - before, before - now
    old_places = {(item.source, item.id): item for item in gone if item.kind != "broken"}
    moved = [(old_places[key], item) for item in new if (key := (item.source, item.id)) in old_places]
    if moved:
        old, item = moved[0]
        raise ValueError(
            f"{folder} holds a job of which {len(moved):,} inputs are elsewhere now; the first is {item.id} of "
            f"{item.source}: {_place(old)} there, {_place(item)} now; put them back, or use another folder"
        )
    return (
        f"since this job began, its sources have {new.total():,} new inputs and {gone.total():,} are gone"
        f"{'' if new or gone else ', but they come in another order'}; it keeps to the list that it began with: "
        f"embed what is new into another folder"
    )


def _place(item: Input) -> str:
    where = {"tar": f" at byte {item.offset}, {item.size} bytes", "parquet": f" column {item.note}"}
    return as_text(item.path) + where.get(item.kind, f" {item.note}" if item.note else "")

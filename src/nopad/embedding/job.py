"""The bulk job: sources to a folder of Parquet shards, finished shards kept whatever happens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nopad.counts import are, counted
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.names import as_text
from nopad.embedding.manifest import check_same, fingerprint, record_of
from nopad.embedding.settings import Settings
from nopad.embedding.table.names import parse_shard_name, shard_name
from nopad.embedding.table.reader import num_rows, read_metadata
from nopad.embedding.table.writer import Row, ShardFormat, write_shard
from nopad.encoder import PackedEncoder
from nopad.pipeline.worker import Worker
from nopad.terminal import printable

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A job that was begun in a folder: what each shard holds, which are there, how to write the others.

    Attributes:
        check_lock: raises `LostLockError` where the folder is no longer this job's.
    """

    settings: Settings
    folder: JobFolder
    record: Mapping[str, str]
    inputs: InputList
    check_lock: Callable[[], None]
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.record)

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.settings.rows_per_shard)

    @property
    def threads(self) -> int | None:
        """How many threads compute on a CPU: as many as when the job began."""
        return int(self.record["threads"]) if self.record["threads"] else None

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder.path / shard_name(shard, len(self), self.fingerprint)

    def of(self, shard: int) -> list[Input]:
        """The inputs of a shard."""
        size = self.settings.rows_per_shard
        return self.inputs[shard * size : (shard + 1) * size]

    def size(self, shard: int) -> int:
        """How many inputs a shard has."""
        size = self.settings.rows_per_shard
        return min(size, len(self.inputs) - shard * size)

    def finished(self) -> list[int]:
        """Numbers of the shards that are there, by their names.

        Raises:
            ValueError: a shard of another job.
        """
        shards = []
        for path in sorted(self.folder.path.glob("shard-*.parquet")):
            parsed = parse_shard_name(path.name)
            if parsed is None or parsed[1:] != (len(self), self.fingerprint) or parsed[0] >= len(self):
                raise ValueError(printable(f"{path}: not a shard of this job; move it away or use another folder"))
            shards.append(parsed[0])
        return shards

    def check(self, shard: int) -> None:
        """Check that a shard is the one that its name states.

        Raises:
            ValueError: a copy of another shard, one of another job, or a damaged file.
        """
        path = self.path(shard)
        actual = {**read_metadata(path), "rows": str(num_rows(path))}
        expected = {**self.metadata(shard), "rows": str(self.size(shard))}
        for key, value in expected.items():
            if (got := actual.get(key, "none")) != value:
                difference = f"{key} {got}, expected {value}"
                raise ValueError(printable(f"{path}: not this shard: {difference}; move it away and run the job again"))

    def metadata(self, shard: int) -> dict[str, str]:
        """The metadata in a shard's schema."""
        return {**{key: value for key, value in self.record.items() if key != "sources"}, "shard": str(shard)}

    def write(self, shard: int, rows: Sequence[Row], encoder: PackedEncoder) -> None:
        """Put a shard in its place, whole.

        Raises:
            LostLockError: the folder is no longer this job's.
            OSError: see `write_shard`.
        """
        path, selection = self.path(shard), self.settings.selection
        format = ShardFormat(
            dimension=selection.embedding_size(encoder),
            embedding_dtype=self.settings.embedding_dtype,
            embedding_list=self.settings.embedding_list,
            token_dimension=encoder.hidden_size if selection.tokens else None,
            token_layers=selection.layers and encoder.layer_indices(selection.layers),
            tokens_pool=selection.tokens_pool,
        )
        temporary = self.folder.temporary(path)
        self.check_lock()
        write_shard(path, rows, format, self.metadata(shard), temporary=temporary, check=self.check_lock)


def make_reader(settings: Settings) -> Reader:
    """A reader of a job's inputs."""
    decoder = MediaDecoder(frames=settings.frames, max_pixels=settings.max_pixels)
    return Reader(decoder, allow_outside_paths=settings.allow_outside_paths)


def begin_or_resume(
    folder: JobFolder,
    check_lock: Callable[[], None],
    settings: Settings,
    worker: Worker,
    sources: list[str],
    inputs: InputList,
) -> tuple[Job, list[str]]:
    """The job of this folder, and what has changed in its sources; a job's list is the one that it was begun with."""
    record = record_of(settings, worker, sources, inputs)
    if not folder.has_job:
        job = Job(settings, folder, record, inputs, check_lock)
        _check_shards(job)  # before anything is written
        folder.begin(record, inputs)
        return job, []
    begun, retained = folder.read()
    check_same(begun, record, folder.path)
    changes = [] if begun["inputs"] == record["inputs"] else [_changes(retained, inputs, folder.path)]
    for change in changes:
        logger.warning(change)
    job = Job(settings, folder, begun, retained, check_lock)
    _check_shards(job)
    return job, changes


def _check_shards(job: Job) -> None:
    for shard in job.finished():
        job.check(shard)


def _changes(retained: InputList, listed: InputList, folder: Path) -> str:
    """How the sources have changed since the job began.

    Raises:
        ValueError: inputs that are elsewhere now; their old places may hold anything.
    """
    before, now = Counter(retained), Counter(listed)
    new, gone = now - before, before - now
    old_places = {(item.source, item.id): item for item in gone if item.kind != "broken"}
    moved = [(old_places[key], item) for item in new if (key := (item.source, item.id)) in old_places]
    if moved:
        old, item = moved[0]
        message = (
            f"{folder} holds a job of which {counted(len(moved), 'input')} {are(len(moved))} elsewhere now; the first "
            f"is {item.id} of {item.source}: {_place(old)} there, {_place(item)} now; put them back, or use another "
            f"folder"
        )
        raise ValueError(printable(message))
    return (
        f"since this job began, its sources have {counted(new.total(), 'new input')} and {gone.total():,} "
        f"{are(gone.total())} gone"
        f"{'' if new or gone else ', but they come in another order'}; it keeps to the list that it began with: "
        f"embed what is new into another folder"
    )


def _place(item: Input) -> str:
    where = {"tar": f" at byte {item.offset}, {item.size} bytes", "parquet": f" column {item.note}"}
    return as_text(item.path) + where.get(item.kind, f" {item.note}" if item.note else "")

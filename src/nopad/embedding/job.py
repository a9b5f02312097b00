"""The bulk job: sources to a folder of Parquet shards, finished shards kept whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from nopad.embedding.borders import TARS, Borders, with_borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.extras import EXIF, THUMBNAIL
from nopad.embedding.inputs.kept import TIME, Kept
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.inputs.whole_tars import Found, WholeTars, expanded
from nopad.embedding.manifest import check_same, fingerprint, jobs_in
from nopad.embedding.settings import Settings
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.format import COLUMNS, TOKENS, ShardFormat
from nopad.embedding.table.names import parse_shard_name, shard_name
from nopad.embedding.table.paths import TablePath
from nopad.embedding.table.reader import failed_rows, num_rows, read_metadata
from nopad.embedding.table.writer import ShardWriter
from nopad.encoder import PackedEncoder
from nopad.pipeline.selection import Selection
from nopad.terminal import printable


@dataclass(frozen=True)
class FeatureSizes:
    """How long an encoder's features are.

    Attributes:
        embedding: values of a vector.
        tokens: the hidden size where tokens are stored, else `None`.
        layers: of which tokens are stored, from 0; `None` for the last one.
    """

    embedding: int
    tokens: int | None
    layers: tuple[int, ...] | None

    @classmethod
    def of(cls, encoder: PackedEncoder, selection: Selection) -> FeatureSizes:
        """Those of the features that a job keeps."""
        layers = selection.layers and encoder.layer_indices(selection.layers)
        return cls(selection.embedding_size(encoder), encoder.hidden_size if selection.tokens else None, layers)

    def shard_format(self, settings: Settings, kept: pa.Schema | None = None) -> ShardFormat:
        """The columns of a table of such features.

        Args:
            kept: columns of the data.
        """
        return ShardFormat(
            dimension=self.embedding,
            embedding_dtype=settings.embedding_dtype,
            embedding_list=settings.embedding_list,
            token_dimension=self.tokens,
            token_layers=self.layers,
            tokens_pool=settings.tokens_pool,
            kept=kept,
        )


@dataclass(frozen=True)
class NewJob:
    """What a job is begun with.

    Attributes:
        inputs: what is listed now.
        borders: its shards.
        stamps: of the inputs; `None` where there is a job in the folder.
        kept: the columns that it keeps, see `kept_columns`.
        whole_tars: those of the inputs.
    """

    inputs: InputList
    borders: Borders
    stamps: StampSpool | None = None
    kept: Kept | None = None
    whole_tars: WholeTars = field(default_factory=WholeTars)


@dataclass
class Job:
    """A job that was begun in a folder: what each shard holds, which are there, how to write the others.

    Attributes:
        borders: which of the inputs each shard has.
        check_lock: raises `LostLockError` where the folder is no longer this job's.
    """

    settings: Settings
    folder: JobFolder
    record: Mapping[str, str]
    inputs: InputList
    borders: Borders
    check_lock: Callable[[], None]
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.record)

    def __len__(self) -> int:
        return len(self.borders)

    @property
    def threads(self) -> int | None:
        """How many threads compute on a CPU: as many as when the job began."""
        return int(self.record["threads"]) if self.record["threads"] else None

    @cached_property
    def kept(self) -> Kept | None:
        """The kept columns of the inputs; `None` where there are none."""
        return Kept.from_text(self.record["columns"]) if self.record.get("columns") else None

    @property
    def part(self) -> range:
        """The shards that this command is to make: all, or those of its part."""
        part, parts = self.settings.part or (0, 1)
        return range(len(self) * part // parts, len(self) * (part + 1) // parts)

    def path(self, shard: int) -> TablePath:
        """The file of a shard."""
        return self.folder.path / shard_name(shard, len(self), self.fingerprint)

    def of(self, shard: int, found: Found | None = None) -> Iterator[Input]:
        """The inputs of the rows of a shard; images of whole tars as they are found.

        Args:
            found: counts these.

        Raises:
            UnreachableError, UnreachableSourceError, UnusableStoreError: a whole tar cannot be reached.
        """
        places = self.borders[shard]
        items, settings = self.inputs[places.start : places.stop], self.settings
        return expanded(items, settings.input_timeout, found, unreachable_rows=settings.unreachable_rows)

    def size(self, shard: int) -> int:
        """How many inputs a shard has, of which a whole tar is one."""
        return len(self.borders[shard])

    @cached_property
    def whole_tars(self) -> WholeTars:
        """Those of the inputs."""
        return WholeTars.of(self.inputs) if TARS in self.record else WholeTars()

    def tars(self, shard: int) -> WholeTars:
        """The whole tars of a shard: only its file says how many rows it has."""
        return self.whole_tars.within(self.borders[shard])

    def finished(self) -> dict[int, TablePath]:
        """The shards that are there, by their names: numbers, in order, and files.

        Raises:
            ValueError: a shard of another job.
        """
        shards = {}
        others = jobs_in(self.folder.path).keys() - {self.fingerprint}
        for path in sorted(self.folder.path.glob("shard-*.parquet")):
            parsed = parse_shard_name(path.name)
            if parsed is not None and parsed[2] in others:  # of the table's first job, or of an update
                continue
            if parsed is None or parsed[1:] != (len(self), self.fingerprint) or parsed[0] >= len(self):
                raise ValueError(printable(f"{path}: not a shard of this job; move it away or use another folder"))
            shards[parsed[0]] = path
        return shards

    def check(self, shard: int) -> None:
        """Check that a shard is the one that its name states.

        Raises:
            ValueError: a copy of another shard, one of another job, or a damaged file.
        """
        path = self.path(shard)
        actual = {**read_metadata(path), "rows": str(num_rows(path))}
        expected = self.metadata(shard)
        if not self.tars(shard):
            expected["rows"] = str(self.size(shard))
        for key, value in expected.items():
            if (got := actual.get(key, "none")) != value:
                difference = f"{key} {got}, expected {value}"
                raise ValueError(printable(f"{path}: not this shard: {difference}; move it away and run the job again"))

    def metadata(self, shard: int) -> dict[str, str]:
        """The metadata in a shard's schema."""
        return {**{key: value for key, value in self.record.items() if key != "sources"}, "shard": str(shard)}

    def failed(self, shard: int) -> list[int]:
        """The failed rows of a shard that is there."""
        return [row for row, *_ in failed_rows(self.path(shard))]

    def new_shard(self, shard: int, sizes: FeatureSizes) -> ShardWriter:
        """Begin to write a shard, which is put in its place whole.

        Raises:
            LostLockError: the folder is no longer this job's, also once the shard is finished.
            OSError: see `ShardWriter`.
        """
        path = self.path(shard)
        format = sizes.shard_format(self.settings, None if self.kept is None else self.kept.schema)
        temporary = self.folder.temporary(path)
        self.check_lock()
        return ShardWriter(path, format, self.metadata(shard), temporary=temporary, check=self.check_lock)


def make_reader(settings: Settings) -> Reader:
    """A reader of a job's inputs."""
    extras: dict[str, Any] = {"thumbnails": settings.thumbnails, "exif": settings.exif}
    decoder = MediaDecoder(frames=settings.frames, max_pixels=settings.max_pixels, **extras)
    return Reader(decoder, allow_outside_paths=settings.allow_outside_paths, timeout=settings.input_timeout)


def begin_or_resume(
    folder: JobFolder,
    check_lock: Callable[[], None],
    settings: Settings,
    record: Mapping[str, str],
    new: NewJob,
    manifest: Manifest,
) -> list[Job]:
    """The jobs of this folder: the table's first one, which is begun where there is none, and those of its updates.

    A job's list is the one that it was begun with.

    Args:
        record: of `settings`, see `record_of`.
        new: what a job is begun with.
        manifest: of the table; shards that it has were checked before.

    Raises:
        ValueError: a job with other settings, damaged files, shards of another job; with `settings.update` the sources
            may be others, and the version of jobs that are whole.
    """
    if new.stamps is not None:
        if new.kept is not None:
            record = {**record, "columns": new.kept.to_text()}
        record = with_borders(record, new.borders, len(new.inputs), new.whole_tars)
        job = Job(settings, folder, record, new.inputs, new.borders, check_lock)
        _check_shards(job, manifest)  # before anything is written
        by_parts = settings.part is not None
        folder.begin(record, new.inputs, new.borders, new.stamps.tables(), check_lock, by_parts=by_parts)
        if settings.part is None:
            return [job]
        # Another part may have begun it meanwhile: it is gone on with as that has it.
    jobs = []
    for each in folder.all():
        begun, retained, borders = each.read()
        job = Job(settings, each, begun, retained, borders, check_lock)
        check_same(begun, {**record, **_may_differ(job)}, folder.path)
        _check_shards(job, manifest)
        jobs.append(job)
    return jobs


def kept_columns(settings: Settings, inputs: InputList) -> Kept | None:
    """The columns that a new job keeps: of its inputs' own, times of videos, and values found in files.

    Raises:
        ValueError: no input has such a column, or the table needs its name.
    """
    extras = (*(EXIF if settings.exif else ()), *([THUMBNAIL] if settings.thumbnails else ()))
    taken = (*COLUMNS, TOKENS, TIME, *extras)
    kept = None if settings.keep is None else Kept.of(inputs, settings.keep, taken, settings.input_timeout)
    nothing = Kept({}, pa.schema([]))
    if settings.fps is not None or settings.every is not None:
        kept = (kept or nothing).with_times()
    return (kept or nothing).with_extras(extras) if extras else kept


def _may_differ(job: Job) -> dict[str, str]:
    """Entries of a job's record in which the command may differ, with the reason."""
    keys = {"table", "update", "columns", "shards", TARS}
    if job.settings.update or job.folder.update:
        keys |= {"sources"}
        if len(job.finished()) == len(job):
            keys |= {"version"}
    return {key: job.record[key] for key in keys & job.record.keys()}


def _check_shards(job: Job, manifest: Manifest) -> None:
    for shard, path in job.finished().items():
        if shard in job.part and not manifest.has(path):
            job.check(shard)

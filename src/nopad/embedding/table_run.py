"""One call of `nopad.embed`: the jobs of a table are begun or resumed, run, and summed up."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from nopad.embedding.actors.starting import StartingActors
from nopad.embedding.borders import TARS, Borders, too_many_files, too_many_with_update
from nopad.embedding.distributed import ByActors
from nopad.embedding.folder import JobFolder
from nopad.embedding.in_process import InProcess
from nopad.embedding.inputs.changes import changes_of
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import Listing, list_inputs
from nopad.embedding.inputs.spans import Spans
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.job import Job, NewJob, begin_or_resume, kept_columns
from nopad.embedding.listing_helpers import list_in_shares
from nopad.embedding.locks import Lock, lock_of
from nopad.embedding.making import RunCounts
from nopad.embedding.progress import Progress
from nopad.embedding.run import Run
from nopad.embedding.settings import Settings
from nopad.embedding.summary import Summary, summary_of
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.errors import check_place
from nopad.embedding.updates import begin_update, compare, mark
from nopad.encoder import PackedEncoder
from nopad.local_paths import name_text

logger = logging.getLogger(__name__)


def list_sources(
    sources: Sequence[str],
    settings: Settings,
    cache: ListingCache | None,
    stop: threading.Event | None = None,
    *,
    whole_tars: bool = False,
) -> Listing:
    """The inputs of sources, listed by the options of a job.

    Args:
        cache, stop, whole_tars: see `list_inputs`.

    Raises:
        ValueError, OSError, ImportError: see `list_inputs`.
    """
    spans = Spans.of_options(settings.fps, settings.every)
    columns = {"image_column": settings.image_column, "id_column": settings.id_column}
    options = {"hidden": settings.hidden, "spans": spans, "timeout": settings.input_timeout, "cache": cache}
    return list_inputs(sources, **columns, **options, whole_tars=whole_tars, stop=stop)


def lists_whole_tars(settings: Settings, begun: Mapping[str, str]) -> bool:
    """Whether tars are listed as a whole: where nothing depends on the number of images in them, or as the job was
    begun.

    Args:
        begun: the record of the job that was begun in the folder.
    """
    if begun:
        return TARS in begun
    return settings.shard_size is None and not settings.tokens and not settings.content_hash


def borders_of(listing: Listing, settings: Settings, sizes: SourceBytes | None) -> Borders:
    """The shards of a job, by settings that are `for_inputs`; `sizes` of the inputs where they count."""
    how = settings.rows_per_shard, len(listing.inputs), sizes, listing.whole_tars
    return Borders.at_units(listing.units, *how)


def too_many_of(listing: Listing, borders: Borders) -> str:
    """See `too_many_files`."""
    return too_many_files(borders, listing.units, len(listing.inputs), listing.whole_tars)


@dataclass
class TableRun:
    """Makes what is missing of a table: of its first job, of its updates, and of what is new where that is requested.

    Attributes:
        sources: as the table's first job spells them.
        encoder: the caller's own, `None` to load that of the settings.
        starting: the engine of actors, where they make the shards.
        stop: once set, shards in hand are finished and no others.
        progress: called with how far the run in hand is.
        by_bytes: shards end by the bytes of the sources as well: the user gave no size of them.
        runs: those of the jobs, as they are begun.
    """

    folder: JobFolder
    sources: Sequence[str]
    settings: Settings
    encoder: PackedEncoder | None
    starting: StartingActors | None
    stop: threading.Event
    progress: Callable[[Progress], None] | None
    by_bytes: bool = False
    runs: list[Run] = field(default_factory=list)

    def __call__(self) -> Summary:
        """List the sources, make the shards and return the summary.

        Raises:
            ValueError, OSError, ImportError: see `nopad.embed`.
        """
        sources = self.sources
        if isinstance(self.folder.path, Path):
            check_place(self.folder.path)  # before sources are listed for minutes
        logger.info("listing %s", sources[0] if len(sources) == 1 else f"{len(sources):,} sources")
        whole_tars = lists_whole_tars(self.settings, self.folder.recorded())
        list_in_shares(sources, self.settings, self.folder, self.starting, self.stop, whole_tars=whole_tars)
        cache = self.folder.listing_cache()
        listing = list_sources(sources, self.settings, cache, self.stop, whole_tars=whole_tars)
        path = self.folder.path
        with lock_of(path, is_part=self.settings.part is not None) as lock, ExitStack() as ends:
            begun = self.folder.recorded()
            self.by_bytes = self.settings.shard_size is None
            self.settings = settings = self.settings.for_inputs(listing.num_images, begun)
            new = self._new(listing)
            if not begun and (too_many := too_many_of(listing, new.borders)):
                logger.warning(too_many)
            if settings.part is None:
                self.folder.clean()
                cache.clean()
            manifest = Manifest(path)
            logger.info("%s; loading the model", listing.describe())
            maker = self._maker(listing.num_images, len(new.borders), begun, lock)
            ends.callback(maker.close)
            if maker.encoder is None:
                return self._summary_without_encoder(listing, lock)
            logger.info(maker.encoder.description)
            sources_record = {"sources": json.dumps([*map(name_text, sources)]), "inputs": listing.inputs.digest()}
            record = {**maker.encoder.record, **sources_record}
            jobs = begin_or_resume(self.folder, lock.check, settings, record, new, manifest)
            changes = self._changes(jobs, record, listing)
            for job in jobs:
                self._run(job, maker, manifest)
            if settings.update and all(len(job.finished()) == len(job) for job in jobs):
                changes = self._update(jobs, record, listing, maker, manifest)
            summary = summary_of([run.summary(listing.left_out, changes) for run in self.runs])
            with suppress(OSError):  # it saves time alone
                manifest.save([path for run in self.runs for path in run.job.finished().values()], lock.check)
            if settings.part is None or not (summary.missing or settings.retry_failed):
                self.folder.clean()  # what actors or parts that were killed have left
            return summary

    def _new(self, listing: Listing) -> NewJob:
        """What a job is begun with; where there is one, what it is compared with."""
        inputs = listing.inputs
        if self.folder.has_job:
            return NewJob(inputs, borders_of(listing, self.settings, None))
        stamps = StampSpool.of(inputs, contents=self.settings.content_hash)
        sizes = SourceBytes.of(inputs, stamps) if self.by_bytes else None
        borders = borders_of(listing, self.settings, sizes)
        return NewJob(inputs, borders, stamps, kept_columns(self.settings, inputs), listing.whole_tars)

    def _maker(self, num_inputs: int, num_shards: int, begun: Mapping[str, str], lock: Lock) -> InProcess | ByActors:
        settings = self.settings
        if self.starting is None:
            estimates = self.progress is not None
            return InProcess(settings, self.encoder, num_inputs, begun, estimates=estimates)
        if settings.part is None:
            num_shards -= sum(1 for _ in self.folder.path.glob("shard-*.parquet"))
        else:
            num_shards //= settings.part[1]
        return ByActors(self.starting, settings, self.folder, num_inputs, num_shards, begun, lock.token, self.stop)

    def _run(self, job: Job, maker: InProcess | ByActors, manifest: Manifest) -> None:
        self.runs.append(Run(job, maker.new_counts(), manifest, stop=self.stop, progress=self.progress))
        maker.work(self.runs[-1])

    def _changes(self, jobs: Sequence[Job], record: dict[str, str], listing: Listing) -> list[str]:
        """How the sources have changed since a table without updates was begun; logged, too."""
        if self.settings.update or len(jobs) > 1 or jobs[0].record["inputs"] == record["inputs"]:
            return []
        if not (changes := changes_of(jobs[0].inputs, listing.inputs, self.folder.path)):
            return []
        logger.warning(changes)
        return [changes]

    def _update(
        self,
        jobs: Sequence[Job],
        record: dict[str, str],
        listing: Listing,
        maker: InProcess | ByActors,
        manifest: Manifest,
    ) -> list[str]:
        """Mark rows whose inputs have changed or are gone, and make a job of what is new; the changes in words."""
        assert maker.encoder is not None
        difference = compare(jobs, listing, self.sources, manifest, contents=self.settings.content_hash)
        changes = difference.describe()
        logger.info(changes[0])
        mark(jobs, difference.marks, maker.encoder.sizes)
        if len(difference.new):
            update = begin_update(self.folder, jobs, record, difference, by_bytes=self.by_bytes)
            if too_many := too_many_with_update(sum(map(len, (*jobs, update)))):
                logger.warning(too_many)
            self._run(update, maker, manifest)
        return changes

    def _summary_without_encoder(self, listing: Listing, lock: Lock) -> Summary:
        """The summary of a call that was stopped before it had an encoder."""
        jobs = [Job(self.settings, each, *each.read(), lock.check) for each in self.folder.all()]
        manifest = Manifest(self.folder.path)
        if jobs:
            return summary_of([Run(job, RunCounts(), manifest).summary(listing.left_out, []) for job in jobs])
        return Summary.of_nothing(str(self.folder.path), len(listing.inputs), listing.left_out)

"""From what the user names to the list of images and videos to read."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from nopad.counts import counted
from nopad.embedding.inputs.ahead import begun_ahead
from nopad.embedding.inputs.archive_listing import Archive, ArchiveOptions
from nopad.embedding.inputs.durations import DurationProcess
from nopad.embedding.inputs.lister import Lister, Processes
from nopad.embedding.inputs.listing import Input, InputList, InputWriter
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.names import COMPRESSED_TARS, check_source, expand_braces
from nopad.embedding.inputs.reaching import source_errors
from nopad.embedding.inputs.spans import Spans
from nopad.embedding.inputs.spool import Spool
from nopad.embedding.inputs.table_pool import TablePool
from nopad.embedding.inputs.units import UnitEdge, Units
from nopad.embedding.inputs.whole_tars import WHOLE_TAR, WholeTars, WholeTarWriter
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS
from nopad.storage import objects
from nopad.storage.addresses import local_path, scheme_of
from nopad.terminal import printable

logger = logging.getLogger(__name__)


Rows = Input | pa.Table | UnitEdge
"""An input, or those of a file that was listed before, or an edge of a unit."""

NUM_ARCHIVES = 4
"""Tars and Parquet files that are listed at the same time; of objects some blocks of each are in memory."""

REPORT_SECONDS = 10.0
"""Seconds until the first line on how far a listing is; then as long as it has taken so far, ten minutes at most."""

_MAX_REPORT_SECONDS = 600.0


@dataclass(frozen=True)
class Listing:
    """The inputs of a job.

    Attributes:
        left_out: how many files of which suffix (`""` for none) were left out as no image or video.
        units: see `Units`.
        whole_tars: those among the inputs.
    """

    inputs: InputList
    left_out: dict[str, int]
    units: np.ndarray
    whole_tars: WholeTars = field(default_factory=WholeTars)

    @property
    def num_images(self) -> int:
        """How many images the inputs have, as far as that is known."""
        return self.whole_tars.num_images(len(self.inputs))

    def describe(self) -> str:
        """How many inputs there are, in words."""
        others = len(self.inputs) - len(self.whole_tars)
        parts = [self.whole_tars.describe()] * bool(self.whole_tars) + [counted(others, "input")] * bool(others)
        return " and ".join(parts)


def list_inputs(
    sources: Sequence[str | Path],
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    hidden: bool = False,
    spans: Spans | None = None,
    timeout: float | None = INPUT_TIMEOUT_SECONDS,
    cache: ListingCache | None = None,
    whole_tars: bool = False,
    stop: threading.Event | None = None,
) -> Listing:
    """List the images and videos of each source, in the order given; nothing is decoded.

    A path that exists is taken as such, any other as a glob or, with braces (`{00000..00099}.tar`, `{a,b}/*.jpg`), as
    the several sources that a shell would make of it; those of them that are missing are `"broken"` inputs:

    - A **folder** gives the images and videos below it, by suffix and in the order of the bytes of their paths; other
      files are left out. Where it has none, but tars or Parquet files, it gives what is in those. Links are followed, a
      folder that holds itself only once. A folder that cannot be listed is a `"broken"` input. Tables of features are
      passed over.
    - A folder written by `datasets`' `save_to_disk` gives its rows, of a DatasetDict all splits.
    - A **glob** gives every match in that order: folders as above (with `**`, which finds their files, folders are
      passed over), files as in a list. As in a shell, `*` finds no name that begins with a dot.
    - A **list file** (`.txt`, `.lst`) has a path in each line, taken whatever its suffix: tars and Parquet files for
      what is in them, videos by suffix, the rest as images. Relative paths start at the list file's folder or, for
      what is only there, at the current one. Blank lines are skipped.
    - A **tar** gives its images, a **Parquet file** its rows, any other **file** itself. Tars and Parquet files that
      hold no images are left out where other sources do.

    Images have a suffix of a format that is read. What is listed twice is read twice. What is hidden or left by a
    system (`._*`, `.thumbnails` and other folders with a dot, `@eaDir`, `#recycle`, …; see `names.is_hidden`) is left
    out and counted under `"hidden"`, in folders, globs and tars, unless it is named.

    Any of them may be an address (`s3://bucket/photos`, see `nopad.storage.addresses.SCHEMES`): what has no object of
    its own is a folder of those below it. On the web (`https://`) there are files alone, no folders or globs.

    Args:
        sources: paths, addresses and globs.
        image_column: the column of image bytes in Parquet files and datasets; by default the only one, or the only one
            with a common name.
        id_column: the column of names for the rows of Parquet files and datasets; by default, and where there is none
            of at most 4,096 characters, their numbers.
        hidden: take what is hidden, too.
        spans: the rows that a video gives; one unless given.
        timeout: seconds for what is read of a table in one go, and to open a video; `None` for no limit.
        cache: finds and keeps the inputs of tars and Parquet files.
        whole_tars: take tars by their size as one input each, see `nopad.embedding.inputs.whole_tars`.
        stop: once set, listing ends.

    Raises:
        ValueError: a source or a line of a list file that is an address of another scheme; a source that is missing,
            matches nothing or has nothing to read in it; a compressed tar that is a source by itself; several columns
            of images and no `image_column`; `image_column` where nothing has columns.
        ImportError: an address needs a package that is not installed.
        UnreachableSourceError: a source cannot be reached now.
        InterruptedError: `stop` was set.
    """
    if isinstance(sources, str | Path) or not sources:
        raise ValueError(f"sources: expected a list of paths and globs, got {sources!r}")
    for source in sources:
        check_source("sources", source)
    for source in _repeated(sources):
        logger.warning("sources: %s is given more than once, and all in it has as many rows", printable(source))
    objects.forget()
    cache = cache or ListingCache(None)
    left_out: Counter[str] = Counter()
    first_broken: list[Input] = []
    nothing_in: list[str] = []
    kinds = set()
    is_any_whole = False

    def check() -> None:
        if stop is not None and stop.is_set():
            raise InterruptedError("stopped while the sources were listed")

    def every(processes: Processes) -> Iterator[tuple[Lister, Rows]]:
        nonlocal is_any_whole
        options = ArchiveOptions(processes.tables, cache, image_column, id_column, hidden, whole_tars)
        listers = (
            Lister(name, processes, options, spans, may_be_missing=is_expanded, check=check)
            for name, is_expanded in names_of(sources)
        )
        is_empty = True
        for lister, rows in rows_of(listers):
            if rows is None:
                if is_empty:
                    reason = f"{lister.source}: no image or video in it{_summary(lister.left_out)}"
                    nothing_in.append(lister.refusals[0] if lister.refusals else reason)
                    if not (lister.is_archive or lister.may_be_missing):
                        raise ValueError(printable(nothing_in[-1]))
                left_out.update(lister.left_out)
                is_empty = True
                continue
            yield lister, rows
            if isinstance(rows, UnitEdge):
                continue
            is_empty = False
            if not isinstance(rows, Input):  # of files without anything broken
                kinds.update(rows["kind"].unique().to_pylist())
                is_any_whole = True
            else:
                kinds.add(rows.kind)
                is_any_whole = is_any_whole or rows.kind != "broken"
                if rows.kind == "broken" and not first_broken:
                    first_broken.append(rows)

    processes = closing(TablePool(timeout)), closing(DurationProcess(timeout)), closing(Spool(timeout))
    with processes[0] as tables, processes[1] as durations, processes[2] as videos, InputWriter() as writer, cache:
        progress, units, tars = ListingProgress(), Units(), WholeTarWriter()
        for lister, rows in every(Processes(tables, durations, videos)):
            check()
            if isinstance(rows, UnitEdge):
                units.add(rows, writer.num_inputs)
            elif isinstance(rows, Input):
                if rows.kind == WHOLE_TAR:
                    tars.add(writer.num_inputs, rows.size)
                writer.add(rows)
            else:
                writer.add_table(rows)
            progress.report(writer.num_inputs, lister)
        inputs = writer.finish()
    if not is_any_whole:
        if not first_broken:
            raise ValueError(printable(nothing_in[0]))
        item = first_broken[0]
        raise ValueError(printable(f"nothing that can be read in the sources; {item.source}, {item.id}: {item.note}"))
    for option, column in {"image_column": image_column, "id_column": id_column}.items():
        if column is not None and kinds.isdisjoint({"parquet", "dataset"}):
            raise ValueError(f"{option}: no source has columns, as Parquet files and datasets do, got {column!r}")
    return Listing(inputs, dict(left_out), units.places(), tars.finish())


def rows_of(listers: Iterator[Lister]) -> Iterator[tuple[Lister, Rows | None]]:
    """The inputs of each lister, those of tars and Parquet files in their place, `None` at its end."""

    def entries() -> Iterator[tuple[Lister, Input | UnitEdge | Archive | None]]:
        for lister in listers:
            with source_errors(lister.source):
                for rows in lister.inputs():
                    yield lister, rows
            yield lister, None

    begun: list[Archive] = []

    def begin(entry: tuple[Lister, object]) -> bool:
        if not isinstance(archive := entry[1], Archive):
            return False
        archive.begin()
        begun.append(archive)
        return True

    try:
        for lister, rows in begun_ahead(entries(), begin, NUM_ARCHIVES):
            if isinstance(rows, Archive):
                lister.file_of = rows.file_of
                with source_errors(lister.source):
                    for each in rows.inputs():
                        yield lister, each
                begun.remove(rows)
                lister.add(rows)
                continue
            if rows is None:
                lister.finish()
            yield lister, rows
    finally:
        for archive in begun:
            archive.close()


class ListingProgress:
    """Logs how far a listing is, now and then."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._next = REPORT_SECONDS

    def report(self, num_inputs: int, lister: Lister) -> None:
        """Log it if it is time."""
        if (seconds := time.monotonic() - self._start) < self._next:
            return
        self._next = seconds + min(max(seconds, REPORT_SECONDS), _MAX_REPORT_SECONDS)
        number, total = lister.file_of
        of_files = f", file {number:,} of {total:,}" if total else ""
        logger.info("listing: %s so far%s of %s", counted(num_inputs, "input"), of_files, printable(lister.source))


def _repeated(sources: Sequence[str | Path]) -> list[str]:
    names = [os.fspath(source) for source in sources]
    counts = Counter(name if scheme_of(name) else str(Path(name).absolute()) for name in names)
    return [name for name, count in counts.items() if count > 1]


def names_of(sources: Sequence[str | Path]) -> Iterator[tuple[str, bool]]:
    """Each source, and whether it is one of several that braces stand for."""
    for source in sources:
        name = local_path(os.fspath(source))
        name = name.rstrip("/") if scheme_of(name) else name
        words = [name] if os.path.lexists(name) else list(expand_braces(name))
        for word in words:
            yield word, len(words) > 1


def _summary(left_out: Counter[str]) -> str:
    if not left_out:
        return ""
    hint = "; compressed tars must be decompressed first" if any(key in COMPRESSED_TARS for key in left_out) else ""
    counts = ", ".join(f"{count} {key or 'without suffix'}" for key, count in left_out.items())
    return f"; left out: {counts}{hint}"

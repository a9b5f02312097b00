"""Shares of a listing: tars and Parquet files that several processes list at the same time.

Each writes what it has listed beside the table, where `list_inputs` finds it. What cannot be kept, or was not listed,
is listed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count

from nopad.embedding.inputs.archive_listing import Archive, ArchiveOptions
from nopad.embedding.inputs.durations import DurationProcess
from nopad.embedding.inputs.lister import Listed, Lister, Processes
from nopad.embedding.inputs.listing_cache import ListingCache
from nopad.embedding.inputs.sources import ListingProgress, names_of, rows_of
from nopad.embedding.inputs.spool import Spool
from nopad.embedding.inputs.table_pool import TablePool

_MAX_RUN = 32
_MAX_OTHERS = 4096  # that are no tars or tables, before a source is left to `list_inputs`


@dataclass(frozen=True)
class ShareOptions:
    """How sources are listed, see `list_inputs`.

    Attributes:
        sources: as they are spelt in the job.
    """

    sources: tuple[str, ...]
    image_column: str | None
    id_column: str | None
    hidden: bool
    timeout: float | None
    whole_tars: bool


@dataclass(frozen=True)
class Share:
    """Which tars and Parquet files of all a process lists: runs of neighbours, which are kept side by side.

    Attributes:
        number, total: of the share, and of all shares.
        run: the length of a run.
    """

    number: int = 0
    total: int = 1
    run: int = 1

    @classmethod
    def of(cls, number: int, total: int, num_files: int) -> Share:
        """One of the shares of so many files."""
        return cls(number, total, max(1, min(_MAX_RUN, num_files // (4 * total))))

    def has(self, place: int) -> bool:
        """Whether a file is in it."""
        return place // self.run % self.total == self.number


def num_files(options: ShareOptions, cache: ListingCache, check: Callable[[], None]) -> tuple[int, int]:
    """How many tars and Parquet files the sources have, and how many of these are not kept; as far as they can be
    listed."""
    number, places = 0, count()
    with closing(TablePool(options.timeout)) as tables:
        try:
            for lister in _listers(options, cache, tables, check, places):
                number += sum(1 for _ in lister.inputs())
        except InterruptedError:
            raise
        except (OSError, ValueError):  # which is said when everything is listed
            pass
    return next(places), number


def keep_share(options: ShareOptions, cache: ListingCache, share: Share, check: Callable[[], None]) -> None:
    """List a share of the tars and Parquet files that are not kept, and keep it.

    Args:
        check: called for each input; may raise.

    Raises:
        ValueError, OSError: as `list_inputs`.
    """
    progress, number = ListingProgress(), 0
    with closing(TablePool(options.timeout)) as tables, cache:
        for lister, rows in rows_of(_listers(options, cache, tables, check, count(), share)):
            check()
            number += rows is not None
            progress.report(number, lister)
        cache.keep()


def _listers(
    options: ShareOptions,
    cache: ListingCache,
    tables: TablePool,
    check: Callable[[], None],
    places: Iterator[int],
    share: Share = Share(),
) -> Iterator[Lister]:
    processes = Processes(tables, DurationProcess(options.timeout), Spool(options.timeout))  # nothing is read by these
    columns = options.image_column, options.id_column
    for name, is_expanded in names_of(options.sources):
        how = ArchiveOptions(tables, cache, *columns, options.hidden, options.whole_tars)
        yield _ShareLister(name, processes, how, places, share, may_be_missing=is_expanded, check=check)


class _ShareLister(Lister):
    """The new tars and tables of a share alone.

    Args:
        places: of all tars and tables, in turn.
    """

    def __init__(
        self,
        name: str,
        processes: Processes,
        options: ArchiveOptions,
        places: Iterator[int],
        share: Share,
        *,
        may_be_missing: bool,
        check: Callable[[], None],
    ) -> None:
        super().__init__(name, processes, options, None, may_be_missing=may_be_missing, check=check)
        self._places = places
        self._share = share

    def inputs(self) -> Listed:
        """See `Lister.inputs`."""
        num_others = 0
        for each in super().inputs():
            if not isinstance(each, Archive):
                num_others += 1
                if num_others > _MAX_OTHERS:
                    return
            elif self._share.has(next(self._places)) and each.is_new():
                yield each

"""The inputs of one tar or Parquet file among the sources."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from nopad.embedding.inputs.ahead import Ahead
from nopad.embedding.inputs.archives import COMPRESSED, CompressedTarError, tar_inputs
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.listing_cache import ListingCache, Lookup
from nopad.embedding.inputs.names import as_text, suffix_of
from nopad.embedding.inputs.reaching import location_of
from nopad.embedding.inputs.table_pool import TablePool
from nopad.embedding.inputs.table_requests import Table
from nopad.embedding.inputs.tables import NoImageColumnError
from nopad.embedding.inputs.units import UnitEdge
from nopad.embedding.inputs.whole_tars import whole_tar
from nopad.storage.store import Stored


@dataclass(frozen=True)
class ArchiveOptions:
    """How tars and Parquet files are listed; see `nopad.embedding.inputs.sources.list_inputs`."""

    tables: TablePool
    cache: ListingCache
    column: str | None
    id_column: str | None
    hidden: bool
    whole_tars: bool = False


class Archive:
    """A tar or a Parquet file, listed in a thread of its own once it is begun; but for whole tars.

    Args:
        source: in which it was found.
        stored: the object as it was found when its prefix was listed.
        is_source: whether the user has named it.
        file_of: its number among others, and theirs.

    Attributes:
        left_out: what was left out in it, complete once all inputs were taken.
        refusal: why it is left out, if it may have been meant.
    """

    def __init__(
        self,
        path: str,
        source: str,
        options: ArchiveOptions,
        stored: Stored | None,
        *,
        is_source: bool,
        file_of: tuple[int, int],
    ) -> None:
        self._path = path
        self._source = source
        self._options = options
        self._stored = stored
        self._is_source = is_source
        self.file_of = file_of
        self.left_out: Counter[str] = Counter()
        self.refusal = ""
        self._ahead: Ahead[Lookup | Input | UnitEdge] | None = None
        self._whole: Input | None = None

    def is_new(self) -> bool:
        """Whether its inputs are not kept, and can be."""
        lookup = self._look_up()
        return lookup.status is not None and lookup.entry is None and self._whole_tar() is None

    def begin(self) -> None:
        """Begin to list it."""
        self._whole = self._whole_tar()
        if self._whole is None:
            self._ahead = Ahead(self._listed())

    def close(self) -> None:
        """List no more of it."""
        if self._ahead is not None:
            self._ahead.close()

    def inputs(self) -> Iterator[Input | pa.Table | UnitEdge]:
        """Its inputs between the edges of units; one that holds no images is left out.

        Raises:
            CompressedTarError: a compressed tar that the user has named.
            UnreachableSourceError: it cannot be reached.
        """
        yield UnitEdge.BEGIN
        if self._whole is not None:
            yield self._whole
            yield UnitEdge.END
            return
        assert self._ahead is not None
        is_empty = True
        try:
            items = iter(self._ahead)
            lookup = next(items)
            assert isinstance(lookup, Lookup)
            for rows in self._options.cache.inputs(lookup, self.left_out, self._scanned, items):
                is_empty = is_empty and isinstance(rows, UnitEdge)
                yield rows
        except CompressedTarError:
            if self._is_source:
                raise
            is_empty = False
            name = as_text(os.path.basename(self._path))
            yield Input(name, self._source, "broken", location_of(self._path), note=COMPRESSED)
        except NoImageColumnError as error:
            self.refusal = str(error)
        finally:
            self.close()
        yield UnitEdge.END
        if is_empty and not self.left_out:
            self.left_out[suffix_of(self._path)] += 1

    def _whole_tar(self) -> Input | None:
        if not self._options.whole_tars or suffix_of(self._path) == ".parquet":
            return None
        return whole_tar(self._path, self._path, self._stored, hidden=self._options.hidden)

    def _look_up(self) -> Lookup:
        options = self._options
        how = [as_text(self._path), options.hidden, options.column, options.id_column]
        return options.cache.look_up(location_of(self._path), how, self._stored)

    def _listed(self) -> Iterator[Lookup | Input | UnitEdge]:
        """What is known of the file, and unless its inputs are as well, these; in the thread."""
        lookup = self._look_up()
        yield lookup
        if lookup.entry is None:
            yield from self._scanned(lookup)

    def _scanned(self, lookup: Lookup) -> Iterator[Input | UnitEdge]:
        yield from self._scan()
        lookup.check()

    def _scan(self) -> Iterator[Input | UnitEdge]:
        options, text = self._options, as_text(self._path)
        if suffix_of(self._path) == ".parquet":
            table = Table("parquet", location_of(self._path))
            return options.tables.inputs(table, text, options.column, options.id_column)
        return tar_inputs(self._path, text, self.left_out, hidden=options.hidden, timeout=options.tables.timeout)

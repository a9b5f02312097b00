"""Where the images of a table's rows are: its lists of inputs, read when first used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from nopad.embedding.borders import TARS, Borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.whole_tars import NO_TARS, WholeTars, expanded, is_same
from nopad.embedding.manifest import jobs_in
from nopad.embedding.table.paths import TablePath
from nopad.embedding.table.reader import names
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

_NUM_SHARDS = 16  # of whole tars: for each a list is open


@dataclass(frozen=True)
class Shard:
    """A shard's file: of which table's folder and job, and its number in that."""

    folder: TablePath
    path: TablePath
    fingerprint: str
    number: int


class _Inputs:
    """The inputs of a job's rows."""

    def __init__(self, folder: JobFolder, record: Mapping[str, str], inputs: InputList, borders: Borders) -> None:
        self._folder = folder
        self._inputs = inputs
        self._borders = borders
        self._tars = WholeTars.of(inputs) if TARS in record else NO_TARS
        self._found = lru_cache(_NUM_SHARDS)(self._of_shard)

    def of(self, shard: Shard, row: int) -> Input:
        """That of a shard's row."""
        places = self._borders[shard.number]
        if not self._tars.within(places):
            return self._inputs[places[row]]
        return self._found(shard.path, places.start, places.stop).of(row)

    def _of_shard(self, path: TablePath, start: int, stop: int) -> _Found:
        items = self._inputs[start:stop]
        if (kept := self._folder.members(path.name)) is None:
            kept = InputList.of(expanded(items, INPUT_TIMEOUT_SECONDS, unreachable_rows=True))
        changed = {item.source for item in items if not is_same(item, INPUT_TIMEOUT_SECONDS)}
        return _Found(path, kept, changed)


class _Found:
    """The images that were found in a shard's whole tars, by the names of its rows: where one of the tars cannot be
    read or has others now, those of the rest are at other places than their rows.

    Args:
        path: of the shard's file.
        members: inputs, in order.
        changed: tars that are others now.
    """

    def __init__(self, path: TablePath, members: InputList, changed: Collection[str]) -> None:
        self._path, self._members = path, members
        places = {name: place for place, name in enumerate(_numbered((each.source, each.id) for each in members))}
        rows = [(source, id) for source, id, _ in names(path)]
        self._sources = [source for source, _ in rows]
        self._places = [None if name[0] in changed else places.get(name) for name in _numbered(rows)]

    def of(self, row: int) -> Input:
        """That of a row."""
        if (place := self._places[row]) is None:
            raise ValueError(f"{self._path}: row {row}: {self._reason(self._sources[row])}")
        return self._members[place]

    def _reason(self, source: str) -> str:
        notes = (item.note for item in self._members if item.source == source and item.kind == "broken")
        return next(notes, "its tar has other images now; --update takes it as it is now")


def _numbered(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, int]]:
    """Sources and names, and for each how many were the same before it."""
    before = Counter[tuple[str, str]]()
    for pair in pairs:
        yield *pair, before[pair]
        before[pair] += 1


@dataclass(frozen=True)
class Places:
    """Shards, and for each ok row the shard and the row in it.

    Attributes:
        shards: the shards of all tables.
        rows: `(N, 2)`: index into `shards`, row in the shard.
    """

    shards: list[Shard]
    rows: np.ndarray
    _jobs: dict[tuple[TablePath, str], _Inputs] = field(default_factory=dict, repr=False, compare=False)

    def input(self, index: int) -> Input:
        """The input that a row is of.

        Raises:
            ValueError: the table's list of inputs is not beside it.
        """
        number, row = map(int, self.rows[index])
        shard = self.shards[number]
        key = shard.folder, shard.fingerprint
        if key not in self._jobs:
            self._jobs[key] = _job_of(shard)
        return self._jobs[key].of(shard, row)

    def read(self, index: int) -> bytes:
        """The encoded image of a row.

        Raises:
            ImageError: it cannot be read.
            ValueError: see `input`; or a video.
        """
        item = self.input(index)
        if item.kind == "video":
            raise ValueError(f"{item.id}: a video, expected an image")
        with Reader() as reader:
            data = reader.decoder.read(reader.media_now(item))
        assert isinstance(data, bytes)
        return data


def _job_of(shard: Shard) -> _Inputs:
    jobs = jobs_in(shard.folder)
    if shard.fingerprint not in jobs:
        raise ValueError(
            f"{shard.folder}: where its images are is not known: the list of inputs, which `nopad embed` keeps in "
            f".nopad there, is missing or another one; copy .nopad with the shards"
        )
    job = jobs[shard.fingerprint]
    return _Inputs(job, *job.read(is_checked=True))

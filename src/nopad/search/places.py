"""Where the images of a table's rows are: its lists of inputs, read when first used."""

from __future__ import annotations

from collections.abc import Mapping
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
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

_NUM_MEMBERS = 16  # shards, of the members of whole tars: each is an open file


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
        self._members = lru_cache(_NUM_MEMBERS)(self._of_shard)

    def of(self, shard: Shard, row: int) -> Input:
        """That of a shard's row."""
        places = self._borders[shard.number]
        if not self._tars.within(places):
            return self._inputs[places[row]]
        members = self._members(shard.path.name, places.start, places.stop)
        if row >= len(members):
            raise ValueError(f"{shard.path}: row {row}: its tar has other images now; --update takes it as it is now")
        return members[row]

    def _of_shard(self, name: str, start: int, stop: int) -> InputList:
        items = self._inputs[start:stop]
        if all(is_same(item, INPUT_TIMEOUT_SECONDS) for item in items) and (kept := self._folder.members(name)):
            return kept
        return InputList.of(expanded(items, INPUT_TIMEOUT_SECONDS, unreachable_rows=True))


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

"""Where the images of a table's rows are: its lists of inputs, read when first used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from nopad.embedding.borders import TARS, Borders
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.whole_tars import NO_TARS, WholeTars, expanded
from nopad.embedding.manifest import jobs_in
from nopad.embedding.table.paths import TablePath
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

_NUM_EXPANDED = 4  # shards whose tars were listed last


@dataclass(frozen=True)
class Shard:
    """A shard's file: of which table's folder and job, and its number in that."""

    folder: TablePath
    path: TablePath
    fingerprint: str
    number: int


class _Inputs:
    """The inputs of a job's rows."""

    def __init__(self, record: Mapping[str, str], inputs: InputList, borders: Borders) -> None:
        self._inputs = inputs
        self._borders = borders
        self._tars = WholeTars.of(inputs) if TARS in record else NO_TARS
        self._expanded = lru_cache(_NUM_EXPANDED)(self._of_shard)

    def of(self, shard: int, row: int) -> Input:
        """That of a shard's row."""
        places = self._borders[shard]
        if not self._tars.within(places):
            return self._inputs[places[row]]
        items = self._expanded(shard)
        return items[min(row, len(items) - 1)]  # a tar that is another one now is a single broken input

    def _of_shard(self, shard: int) -> list[Input]:
        places = self._borders[shard]
        items = self._inputs[places.start : places.stop]
        return list(expanded(items, INPUT_TIMEOUT_SECONDS, unreachable_rows=True))


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
        return self._jobs[key].of(shard.number, row)

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
    return _Inputs(*jobs[shard.fingerprint].read(is_checked=True))

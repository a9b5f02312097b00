"""Where the images of a table's rows are: its lists of inputs, read when first used."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nopad.embedding.borders import Borders
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.manifest import jobs_in
from nopad.embedding.table.paths import TablePath


@dataclass(frozen=True)
class Shard:
    """A shard's file: of which table's folder and job, and its number in that."""

    folder: TablePath
    path: TablePath
    fingerprint: str
    number: int


_Inputs = tuple[InputList, Borders]


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
        inputs, borders = self._jobs[key]
        return inputs[borders[shard.number][row]]

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
    _, inputs, borders = jobs[shard.fingerprint].read(is_checked=True)
    return inputs, borders

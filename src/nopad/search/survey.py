"""What is known of a table before all of its shards are read, and what they must have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from nopad.embedding.table import reader as stored
from nopad.embedding.table.counts import Manifest
from nopad.embedding.table.paths import TablePath
from nopad.search.places import Shard

_MAX_RATIO = 1000  # of values to bytes; other programs may have compressed the file
SAME_SPACE = ("family", "architecture", "weights", "embedding", "embedding.width")
"""Metadata that tables read together must share: else their vectors cannot be compared."""


@dataclass(frozen=True)
class Survey:
    """What is known before all shards are read.

    Attributes:
        schemas: of each shard, as that of the first of its job.
        num_ok: rows of each shard that are ok.
        firsts: see `Firsts`.
    """

    schemas: list[pa.Schema]
    num_ok: list[int]
    firsts: Firsts

    @property
    def dtype(self) -> np.dtype:
        """A dtype that holds the embeddings of all tables."""
        return np.result_type(*{_value_type(schema) for schema in self.schemas})

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that all shards share."""
        first, *others = self.firsts.metadata().values()
        shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        return {key: value for key, value in shared.items() if key not in ("shard", "table", "update")}


def _value_type(schema: pa.Schema) -> np.dtype:
    return np.dtype(schema.field("embedding").type.value_type.to_pandas_dtype())


class Firsts:
    """The first shard of each table and of each job, which the others must be like."""

    def __init__(self) -> None:
        self._of_folder: dict[TablePath, tuple[Shard, pa.Schema]] = {}
        self._of_job: dict[tuple[TablePath, str], tuple[Shard, pa.Schema]] = {}

    def schema(self, shard: Shard) -> pa.Schema | None:
        """The schema of the first of a shard's job; `None` for this itself."""
        _, schema = self._of_job.get((shard.folder, shard.fingerprint), (None, None))
        return schema

    def check(self, shard: Shard, schema: pa.Schema) -> None:
        """Refuse a shard with other columns than the first of its table, or another job than the first of its own."""
        first, expected = self._of_folder.setdefault(shard.folder, (shard, schema))
        if not schema.equals(expected):
            advice = "run the job again into an empty folder"
            raise ValueError(f"{shard.path}: other columns than {first.path}; {advice}")
        _check_job(shard, schema, *self._of_job.setdefault((shard.folder, shard.fingerprint), (shard, schema)))

    def metadata(self) -> dict[TablePath, dict[str, str]]:
        """Those of each table's first shard."""
        return {folder: stored.metadata_of(schema) for folder, (_, schema) in self._of_folder.items()}


def survey_of(shards: Sequence[Shard]) -> Survey:
    """Count the rows of shards: by the table's manifest, so that a shard is opened once, to be read.

    The first shard of each job is opened, and what the manifest does not have.
    """
    manifests = {folder: Manifest(folder) for folder in dict.fromkeys(shard.folder for shard in shards)}
    firsts = Firsts()
    schemas: list[pa.Schema] = []
    num_ok: list[int] = []
    for shard in shards:
        manifest, schema = manifests[shard.folder], firsts.schema(shard)
        if schema is not None and manifest.has(shard.path):
            count = manifest.count(shard.path)
            ok, num_bytes = count.ok, count.bytes
        else:
            with stored.opened(shard.path) as file:
                schema = file.schema_arrow
                firsts.check(shard, schema)
                ok = int(stored.ok_rows(shard.path, file.read(["status"])).sum())
                num_bytes = shard.path.stat().st_size
        width = stored.embedding_width(schema)
        if not 0 <= ok * width <= _MAX_RATIO * num_bytes:
            raise stored.damaged(shard.path, f"{ok} rows of {width} values, more than it can hold")
        num_ok.append(ok)
        schemas.append(schema)
    _check_same_space(firsts.metadata())
    return Survey(schemas, num_ok, firsts)


def _check_job(shard: Shard, schema: pa.Schema, first: Shard, of_first: pa.Schema) -> None:
    """Refuse a shard whose metadata differ from those of the first of its job."""
    number = str(shard.number)
    expected = {**stored.metadata_of(of_first), "shard": number}
    metadata = {"shard": number, **stored.metadata_of(schema)}  # nopad 0.1 did not write it
    if metadata["shard"] != number:
        raise ValueError(f"{shard.path}: a copy of shard {metadata['shard']}; move it away and run the job again")
    if others := [key for key in {**expected, **metadata} if expected.get(key) != metadata.get(key)]:
        difference = f"{others[0]} {metadata.get(others[0], 'none')}, {expected.get(others[0], 'none')} in {first.path}"
        raise ValueError(f"{shard.path}: of another job: {difference}; move it away and run the job again")


def _check_same_space(metadata: Mapping[TablePath, Mapping[str, str]]) -> None:
    """Refuse tables whose vectors cannot be compared."""
    first, *others = metadata
    for folder in others:
        for key in SAME_SPACE:
            here, there = metadata[folder].get(key, "unset"), metadata[first].get(key, "unset")
            if here != there:
                values = f"{key} {here:.64}, {there:.64} in {first}"
                raise ValueError(f"{folder}: a table of another model, whose vectors cannot be compared: {values}")

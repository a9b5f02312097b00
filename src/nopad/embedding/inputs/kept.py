"""Columns that come with the data and stay with it: of Parquet files, saved datasets, WebDataset samples, and files."""

from __future__ import annotations

import base64
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.inputs import extras as extra_columns
from nopad.embedding.inputs.archives import members_of
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.media import read_range
from nopad.embedding.inputs.reaching import retry, unreachable_source
from nopad.embedding.inputs.spans import time_of
from nopad.embedding.inputs.table_process import TableProcess
from nopad.embedding.inputs.table_requests import Table
from nopad.embedding.inputs.whole_tars import WHOLE_TAR
from nopad.pipeline.channel import valid_text
from nopad.pipeline.request_process import UnreachableFileError, UnreadableError
from nopad.preprocessing.decode import ImageError, UnreachableError, unreachable_error
from nopad.preprocessing.files import FileRange, why
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

ALL, TIME = "all", "time"
MAX_TEXT = 1 << 20
"""Bytes of a sample's JSON or text."""

_TEXTS = ("txt", "json", "cls")
_TABLES = ("parquet", "dataset")


@dataclass(frozen=True)
class Kept:
    """Columns of the inputs that are kept in the table.

    Attributes:
        names: of the inputs' columns, by the names that they have in the table.
        schema: the table's columns.
        times: whether the first of them is where in its video a row begins, in seconds.
        extras: the last of them, which are found in the file itself, see `nopad.embedding.inputs.extras`.
    """

    names: dict[str, str]
    schema: pa.Schema
    times: bool = False
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, inputs: InputList, keep: str, taken: Sequence[str], timeout: float | None) -> Kept:
        """Choose columns by `keep`: names separated by commas, or `all`.

        A column of a name that the table itself has is kept as `kept_` and its name.

        Args:
            inputs: of the job.
            keep: of the settings.
            taken: names of the table's own columns.
            timeout: see `TableProcess`.

        Raises:
            ValueError: a column that no input has, one of several types or of one that a table cannot hold, or inputs
                without columns.
            UnreachableSourceError: a table cannot be reached.
        """
        types: dict[str, pa.DataType] = {}
        requested = None if keep == ALL else [name.strip() for name in keep.split(",") if name.strip()]
        for schema in _schemas(inputs, requested, timeout):
            for field in schema:
                if requested is not None and field.name not in requested:
                    continue
                _check_storable(field)
                if not types.setdefault(field.name, field.type).equals(field.type):
                    raise ValueError(
                        f"keep: column {field.name!r} is {types[field.name]} in one source, {field.type} in another; "
                        f"make them the same, or leave it out"
                    )
        missing = [name for name in requested or () if name not in types]
        if missing or not types:
            which = f"no source has a column {', '.join(map(repr, missing))}" if missing else "no source has columns"
            raise ValueError(f"keep: {which}; Parquet files, saved datasets and WebDataset tars have them")
        names = {f"kept_{name}" if name in taken else name: name for name in requested or types}
        return cls(names, pa.schema([pa.field(name, types[column]) for name, column in names.items()]))

    def to_text(self) -> str:
        """For the record of a job."""
        schema = base64.b64encode(self.schema.serialize().to_pybytes()).decode()
        return json.dumps({"names": self.names, "schema": schema, "times": self.times, "extras": self.extras})

    @classmethod
    def from_text(cls, text: str) -> Kept:
        """The columns that `to_text` has written.

        Raises:
            ValueError: a text that is damaged.
        """
        try:
            content = json.loads(text)
            schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(content["schema"])))
            names = {str(name): str(column) for name, column in content["names"].items()}
            times = content["times"] is True
            extras = tuple(name for name in extra_columns.TYPES if name in content.get("extras", ()))
            if [*[TIME] * times, *names, *extras] != schema.names:
                raise ValueError(f"names {list(names)}, columns {schema.names}")
        except (pa.ArrowException, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"job.json: columns: damaged ({error})") from error
        return cls(names, schema, times, extras)

    def with_times(self) -> Kept:
        """The same behind a column of times."""
        return replace(self, schema=pa.schema([pa.field(TIME, pa.float64()), *self.schema]), times=True)

    def with_extras(self, names: Sequence[str]) -> Kept:
        """The same with columns behind it that are found in the files."""
        fields = [pa.field(name, extra_columns.TYPES[name]) for name in names]
        return replace(self, schema=pa.schema([*self.schema, *fields]), extras=tuple(names))

    def values(
        self, items: Sequence[Input], extras: Sequence[Mapping[str, Any] | None], tables: TableProcess
    ) -> list[tuple[Any, ...]]:
        """For each input its values, None for what it does not have or what is damaged.

        Args:
            items: the inputs.
            extras: what was found in each one's file.
            tables: reads those of the inputs.

        Raises:
            UnreachableError: one of them cannot be reached.
            UnreadableError: `tables` was interrupted.
            ProcessServerError: see `TableProcess`.
        """
        rows = [values for group in _by_file(items) for values in self._of_file(group, tables)]
        if self.times:
            rows = [(time_of(item), *values) for item, values in zip(items, rows, strict=True)]
        if self.extras:
            extra_values = (extra_columns.values_of(each, self.extras) for each in extras)
            rows = [(*values, *more) for values, more in zip(rows, extra_values, strict=True)]
        return rows

    def without_extras(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values of a row whose file is gone or another one."""
        number = len(values) - len(self.extras)
        return (*values[:number], *[None] * len(values[number:]))

    def _of_file(self, items: Sequence[Input], tables: TableProcess) -> Iterator[tuple[Any, ...]]:
        if items[0].kind in _TABLES:
            table, _ = Table.of(items[0])
            try:
                numbers = tuple(item.offset for item in items)
                columns = retry(
                    lambda: tables.values(table, tuple(self.names.values()), numbers),
                    lambda error: isinstance(error, UnreachableFileError),
                )
            except UnreachableFileError as error:
                raise unreachable_error(f"{items[0].id} of {items[0].source}", str(error), error) from error
            except UnreadableError as error:
                if tables.is_interrupted:
                    raise
                logger.warning("%s: its columns are not kept: %s", items[0].source, error)
                columns = [[None] * len(items) for _ in self.names]
            yield from zip(*columns, strict=True) if columns else ((),) * len(items)
        elif items[0].kind == "tar":
            try:
                samples = _samples(items[0].path)
            except OSError as error:
                raise unreachable_error(f"{items[0].id} of {items[0].source}", why(error), error) from error
            yield from (self._of_sample(item, samples.get(_key(item.id), {})) for item in items)
        else:
            yield from ((None,) * len(self.names) for _ in items)

    def _of_sample(self, item: Input, texts: dict[str, FileRange]) -> tuple[Any, ...]:
        read = {suffix: _text(place) for suffix, place in texts.items()}
        try:
            fields = json.loads(read.get("json") or "{}")
        except (ValueError, RecursionError):
            fields = {}
        values = []
        for name, column in self.names.items():
            value = fields.get(column) if isinstance(fields, dict) and column in fields else read.get(column)
            text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            values.append(text if text is None else valid_text(text))
            if values[-1] is not None and not pa.types.is_string(self.schema.field(name).type):
                values[-1] = None
        return tuple(values)


def _by_file(items: Iterable[Input]) -> Iterator[list[Input]]:
    for _, group in groupby(items, key=lambda item: (item.kind, item.path, item.note)):
        yield list(group)


def _schemas(inputs: InputList, requested: Sequence[str] | None, timeout: float | None) -> Iterator[pa.Schema]:
    """The columns of each file among the inputs, without those of the images."""
    seen = set()
    with closing(TableProcess(timeout)) as tables:
        for item in inputs:
            is_tar = item.kind in ("tar", WHOLE_TAR)
            key = ("tar",) if is_tar else (item.kind, item.path, item.note)
            if key in seen or not (is_tar or item.kind in _TABLES):
                continue
            seen.add(key)
            if is_tar:
                yield pa.schema([pa.field(name, pa.string()) for name in (_TEXTS if requested is None else requested)])
                continue
            table, image = Table.of(item)
            try:
                yield pa.schema([field for field in tables.schema(table) if field.name != image])
            except UnreachableFileError as error:
                raise unreachable_source(item.source, f"cannot be reached now: {error}", error) from error
            except UnreadableError as error:
                raise ValueError(f"keep: {item.source}: its columns cannot be read: {error}") from error


def _check_storable(field: pa.Field) -> None:
    try:
        pq.write_table(pa.schema([field]).empty_table(), pa.BufferOutputStream())
        pa.nulls(1, field.type).take(pa.array([0]))  # as the rows of a finished table are chosen
    except pa.ArrowException as error:
        raise ValueError(
            f"keep: column {field.name!r} is {field.type}, which a table cannot hold; name others ({error})"
        ) from error


def _key(name: str) -> str:
    """The name of a member's WebDataset sample: the path up to the first dot of the file's name."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


@lru_cache(2)  # the samples of a shard are of one tar, or of two
def _samples(path: bytes) -> dict[str, dict[str, FileRange]]:
    """The place of each text of a tar's samples, by sample and suffix."""
    samples: dict[str, dict[str, FileRange]] = {}
    for name, offset, size in members_of(path):
        suffix = os.path.basename(name).partition(".")[2]
        if suffix and size <= MAX_TEXT and ("/" not in suffix):
            last = suffix.rsplit(".", 1)[-1]
            samples.setdefault(_key(name), {}).setdefault(
                last, FileRange(path, offset, size, timeout=INPUT_TIMEOUT_SECONDS)
            )
    return samples


def _text(place: FileRange) -> str | None:
    try:
        return read_range(place).decode("utf-8", "replace")
    except UnreachableError:
        raise
    except ImageError:
        return None

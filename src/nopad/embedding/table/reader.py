"""Reads shards of a features table: rows, counts, metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nopad.embedding.table.format import (
    COLUMNS,
    DTYPES,
    FAILED,
    FORMAT,
    KEPT,
    LISTS,
    NUMBERS,
    OK,
    PREFIX,
    STATUSES,
    TOKENS,
    Row,
    ShardFormat,
)
from nopad.embedding.table.paths import TablePath, open_parts

_OF_OK_ROWS = ("id", "source", *NUMBERS, "embedding")


@contextmanager
def opened(path: TablePath) -> Iterator[pq.ParquetFile]:
    """Open a shard and check its columns, their types and, as its pages are read, their checksums.

    Raises:
        ValueError: a file that is damaged or no shard of this format; the message names it.
        OSError: a file that cannot be opened or read.
    """
    try:
        with (
            open_parts(path) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            if problem := _problem(file.schema_arrow):
                raise ValueError(f"{path}: not a shard that this version reads: {problem}")
            yield file
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged ({error}); delete it and run the job again, which makes it anew") from error


def _problem(schema: pa.Schema) -> str:
    """The first difference from a shard of this format, in words; empty without one."""
    metadata = metadata_of(schema)
    if (actual := metadata.get("format", "none")) != FORMAT:
        return f"nopad.format {actual}, expected {FORMAT}"
    has_tokens = TOKENS in schema.names
    for key in ("embedding.width", "tokens.width")[: 1 + has_tokens]:
        if not re.fullmatch(r"[1-9]\d{0,8}", actual := metadata.get(key, "none"), re.ASCII):
            return f"nopad.{key} {actual:.80}, expected a number ≥ 1"
    for key, pattern, expected in (
        ("tokens.layers", r"\d{1,9}(,\d{1,9})*", "layers as 8,11"),
        ("tokens.pool", r"[1-9]\d{0,8}", "a number ≥ 1"),
    ):
        if key in metadata and not re.fullmatch(pattern, metadata[key], re.ASCII):
            return f"nopad.{key} {metadata[key]:.80}, expected {expected}"
    tokens = int(metadata["tokens.width"]) if has_tokens else None
    kept = _kept(schema, metadata)
    if isinstance(kept, str):
        return kept
    options = {"dimension": int(metadata["embedding.width"]), "token_dimension": tokens, "kept": kept}
    formats = [
        ShardFormat(embedding_dtype=dtype, embedding_list=list, **options) for dtype, list in product(DTYPES, LISTS)
    ]
    if any(format.schema({}).equals(schema) for format in formats):
        return ""
    columns = ", ".join(f"{field.name} {field.type}" for field in schema)
    expected = ", ".join(f"{field.name} {field.type}" for field in formats[0].schema({}))
    return f"the columns {columns}; expected {expected}, or embeddings of another kind"


def _kept(schema: pa.Schema, metadata: dict[str, str]) -> pa.Schema | str | None:
    """The further columns that a shard declares, or what is wrong with them."""
    if KEPT not in metadata:
        return None
    try:
        names = json.loads(metadata[KEPT])
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or any(schema.names.count(name) != 1 for name in names):
        return f"nopad.{KEPT} {metadata[KEPT]:.200}, expected names of its columns"
    if taken := {*names} & {*COLUMNS, TOKENS}:
        return f"nopad.{KEPT} {metadata[KEPT]:.200}, {min(taken)} is no further column"
    return pa.schema([schema.field(name) for name in names])


def ok_rows(path: TablePath, table: pa.Table) -> np.ndarray:
    """A mask `(N,)` of the rows of a shard that are ok; checks the columns that are in `table`.

    Raises:
        ValueError: rows that `write_shard` refuses to write.
    """
    row_statuses = table["status"].to_pylist()
    ok = np.array([status == OK for status in row_statuses], dtype=bool)
    if others := {*row_statuses} - {*STATUSES}:
        raise damaged(path, f"status {min(map(str, others))!r}, expected one of {', '.join(STATUSES)}")
    for name in _OF_OK_ROWS:
        if name not in table.column_names:
            continue
        column = table[name]
        has = column.is_valid().to_numpy()
        if not has[ok].all():
            raise damaged(path, f"{name} missing in row {np.flatnonzero(ok & ~has)[0]}, which is ok")
        if name == "embedding" and has[~ok].any():
            raise damaged(
                path, f"an embedding in row {(row := np.flatnonzero(~ok & has)[0])}, which is {row_statuses[row]}"
            )
        if name in NUMBERS and ok.any() and (lowest := column.filter(pa.array(ok)).to_numpy().min()) < 1:
            raise damaged(path, f"{name} {lowest}, expected at least 1")
    return ok


def damaged(path: TablePath, what: str) -> ValueError:
    """The error of a shard whose rows cannot be right."""
    return ValueError(f"{path}: damaged ({what}); delete it and run the job again, which makes it anew")


def embedding_width(schema: pa.Schema) -> int:
    """Length of the embeddings of a shard."""
    return int(schema.metadata[f"{PREFIX}embedding.width".encode()])


def token_width(schema: pa.Schema) -> int | None:
    """Hidden size of the tokens of a shard, None where it has none."""
    width = schema.metadata.get(f"{PREFIX}tokens.width".encode())
    return None if width is None else int(width)


def token_layers(schema: pa.Schema) -> tuple[int, ...] | None:
    """The layers of which a shard has tokens, None where it has those of the model alone."""
    layers = schema.metadata.get(f"{PREFIX}tokens.layers".encode())
    return None if layers is None else tuple(map(int, layers.decode().split(",")))


def tokens_pool(schema: pa.Schema) -> int:
    """Side of the squares of tokens of which a shard has the mean."""
    return int(schema.metadata.get(f"{PREFIX}tokens.pool".encode(), b"1"))


def embedding_blocks(column: pa.ChunkedArray, width: int) -> list[np.ndarray]:
    """The embeddings that are not null as matrices `(n, width)`, one per chunk; views where none is null.

    Raises:
        pa.ArrowInvalid: embeddings of another length, or with nulls in them.
    """
    chunks = [chunk.drop_null() if chunk.null_count else chunk for chunk in column.chunks]
    if any((pc.call_function("list_value_length", [chunk]).to_numpy() != width).any() for chunk in chunks):
        raise pa.ArrowInvalid(f"embeddings of another length than {width}")
    return [chunk.flatten().to_numpy().reshape(-1, width) for chunk in chunks]


def iterate_rows(path: TablePath) -> Iterator[Row]:
    """The rows of a shard in order, holding one row group at a time; `write_shard` makes the same file of them.

    Raises:
        ValueError, OSError: see `opened`.
    """
    with opened(path) as file:
        schema = file.schema_arrow
        width = embedding_width(schema)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            ok_rows(path, table)
            embeddings = (vector for block in embedding_blocks(table["embedding"], width) for vector in block)
            tokens = table["tokens"].to_pylist() if "tokens" in table.column_names else [None] * len(table)
            small = table.select(COLUMNS[:-1]).to_pylist()
            further = [table[name] for name in json.loads(metadata_of(file.schema_arrow).get(KEPT, "[]"))]
            kept = zip(*([_value(value) for value in column] for column in further), strict=True)
            for values, raw in zip(small, tokens, strict=True):
                t, h, w = values.pop("grid_t"), values.pop("grid_h"), values.pop("grid_w")
                yield Row(
                    **values,
                    grid=None if t is None else (t, h, w),
                    embedding=next(embeddings) if values["status"] == OK else None,
                    tokens=None if raw is None else np.frombuffer(raw, "<f2").reshape(-1, token_width(schema) or 1),
                    kept=next(kept, ()),
                )


def _value(value: pa.Scalar) -> pa.Scalar | None:
    return value if value.is_valid else None


def read_metadata(path: TablePath) -> dict[str, str]:
    """The metadata that a shard was written with and the format's own (`format`, `embedding.width`, `tokens.…`)."""
    with opened(path) as file:
        return metadata_of(file.schema_arrow)


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """The metadata that `write_shard` has put into a schema."""
    items = (schema.metadata or {}).items()
    pairs = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in items}
    return {key.removeprefix(PREFIX): value for key, value in pairs.items() if key.startswith(PREFIX)}


def num_rows(path: TablePath) -> int:
    """Rows of a shard, by its footer."""
    with opened(path) as file:
        return file.metadata.num_rows


def failed_rows(path: TablePath) -> list[tuple[int, str, str, str]]:
    """`(row number in the shard, source, id, error)` of the failed rows; reads only these columns."""
    with opened(path) as file:
        rows = file.read(["source", "id", "error", "status"]).to_pylist()
    return [
        (number, row["source"], row["id"], row["error"] or "")
        for number, row in enumerate(rows)
        if row["status"] == FAILED
    ]


def names(path: TablePath) -> list[tuple[str, str, str]]:
    """`(source, id, status)` of each row; reads only these columns."""
    with opened(path) as file:
        table = file.read(["source", "id", "status"])
        return list(zip(*(table[name].to_pylist() for name in ("source", "id", "status")), strict=True))


def statuses(path: TablePath) -> list[str]:
    """The status of each row; reads only this column."""
    with opened(path) as file:
        table = file.read(["status"])
        ok_rows(path, table)
        return table["status"].to_pylist()


def count(path: TablePath) -> tuple[int, int]:
    """Numbers of rows that are ok and that failed; reads only the status column."""
    row_statuses = statuses(path)
    return row_statuses.count(OK), row_statuses.count(FAILED)

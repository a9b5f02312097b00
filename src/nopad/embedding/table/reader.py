"""What stands in a shard: its rows, or only what was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nopad.embedding.table.writer import COLUMNS, FORMAT, PREFIX, Row


@contextmanager
def opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard and check its format and, as its pages are read, their checksums.

    Raises:
        ValueError: a file that is damaged or no shard of this format; the message names it.
        OSError: a file that cannot be opened or read.
    """
    try:
        with (
            pa.OSFile(os.fsencode(path)) as source,  # Arrow opens no str that is not UTF-8
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            found = (file.schema_arrow.metadata or {}).get(f"{PREFIX}format".encode(), b"none").decode()
            if found != FORMAT or tuple(file.schema_arrow.names[: len(COLUMNS)]) != COLUMNS:
                expected = f"expected {FORMAT} with the columns {', '.join(COLUMNS)}"
                raise ValueError(f"{path}: not a shard that this version reads: nopad.format {found}, {expected}")
            yield file
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path}: damaged ({error}); delete it and run the job again, which makes it anew") from error


def embedding_width(schema: pa.Schema) -> int:
    """Length of the embeddings of a shard."""
    return int(schema.metadata[f"{PREFIX}embedding.width".encode()])


def token_width(schema: pa.Schema) -> int | None:
    """Hidden size of the tokens of a shard, None where it has none."""
    width = schema.metadata.get(f"{PREFIX}tokens.width".encode())
    return None if width is None else int(width)


def embedding_blocks(column: pa.ChunkedArray, width: int) -> list[np.ndarray]:
    """The embeddings that are not null as matrices `(n, width)`, one per chunk; views where none is null."""
    chunks = [chunk.drop_null() if chunk.null_count else chunk for chunk in column.chunks]
    return [chunk.flatten().to_numpy().reshape(-1, width) for chunk in chunks]


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of a shard in order, holding one row group at a time; `write_shard` makes the same file of them.

    Raises:
        ValueError, OSError: see `opened`.
    """
    with opened(path) as file:
        width = embedding_width(file.schema_arrow)
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            embeddings = (vector for block in embedding_blocks(table["embedding"], width) for vector in block)
            tokens = table["tokens"].to_pylist() if "tokens" in table.column_names else [None] * len(table)
            small = table.select(COLUMNS[:-1]).to_pylist()
            for values, raw in zip(small, tokens, strict=True):
                t, h, w = values.pop("grid_t"), values.pop("grid_h"), values.pop("grid_w")
                yield Row(
                    **values,
                    grid=None if t is None else (t, h, w),
                    embedding=next(embeddings) if values["status"] == "ok" else None,
                    tokens=None if raw is None else np.frombuffer(raw, "<f2").reshape(t * h * w, -1),
                )


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that a shard was written with and the format's own (`format`, `embedding.width`, `tokens.…`)."""
    with opened(path) as file:
        return metadata_of(file.schema_arrow)


def metadata_of(schema: pa.Schema) -> dict[str, str]:
    """What `write_shard` has put into a schema."""
    pairs = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in schema.metadata.items()}
    return {key.removeprefix(PREFIX): value for key, value in pairs.items() if key.startswith(PREFIX)}


def num_rows(path: Path) -> int:
    """Rows of a shard, by its footer."""
    with opened(path) as file:
        return file.metadata.num_rows


def failed_rows(path: Path) -> list[tuple[int, str, str, str]]:
    """`(row number in the shard, source, id, error)` of the failed rows; reads only these columns."""
    with opened(path) as file:
        rows = file.read(["source", "id", "error", "status"]).to_pylist()
    return [
        (number, row["source"], row["id"], row["error"] or "")
        for number, row in enumerate(rows)
        if row["status"] == "failed"
    ]


def count(path: Path) -> tuple[int, int]:
    """How many rows are ok and how many failed; reads only the status column."""
    with opened(path) as file:
        statuses = file.read(["status"])["status"].to_pylist()
    return statuses.count("ok"), statuses.count("failed")

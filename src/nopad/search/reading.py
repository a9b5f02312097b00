"""From a folder of shards to arrays: `nopad.read_features`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nopad.embedding.inputs.extras import THUMBNAIL
from nopad.embedding.table import reader as stored
from nopad.embedding.table.counts import NAME
from nopad.embedding.table.format import COLUMNS, TOKENS
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.embedding.table.paths import TablePath
from nopad.search.features import Failure, Features
from nopad.search.places import Places, Shard
from nopad.search.shards import shards_of
from nopad.search.stored_column import StoredColumn
from nopad.search.survey import Firsts, Survey, survey_of
from nopad.search.thumbnails import Thumbnails
from nopad.search.tokens import Tokens


def read_features(
    folder: str | Path | Sequence[str | Path],
    *,
    partial: bool = False,
    columns: Sequence[str] | None = None,
    memory_map: str | Path | None = None,
) -> Features:
    """Read what `nopad embed --out folder` wrote; embeddings come into memory, tokens stay on disk until indexed.

    Args:
        folder: of one table, or its address in a store (`s3://bucket/table`), or a list of several, whose rows come
            one table after the other. They must be of the same model.
        partial: take the shards of an unfinished job as they are.
        columns: those that the job kept of the inputs' own to take; all unless given.
        memory_map: a file `….npy` to write the embeddings to, from which they are mapped; it is replaced where it
            exists. They may take more than the memory then.

    Raises:
        ValueError: no path, a folder named twice, no such folder, no shards, shards missing (unless `partial`), shards
            of different jobs, a shard that is damaged or has other columns, types or rows than a job writes, tables of
            different models; the message says which and what to do.
        OSError: a shard that cannot be opened or read.
    """
    if isinstance(columns, str):
        raise ValueError(f"columns: expected a list of names, got {columns!r:.80}")
    shards = shards_of(folder, partial)
    survey = survey_of(shards)
    if unknown := [name for name in columns or () if all(name not in _extra_columns(each) for each in survey.schemas)]:
        there = ", ".join(sorted({name for each in survey.schemas for name in _extra_columns(each)})) or "none"
        raise ValueError(f"columns: the table keeps no {unknown[0]!r:.80} of the inputs' own columns, but {there}")
    return _read(shards, survey, columns, None if memory_map is None else Path(memory_map))


read = read_features  # an alias: the name until nopad 0.2


@dataclass(frozen=True)
class _Part:
    """What is read of one shard, of its rows that are ok; embeddings and what stays on the disk are not part of it.

    Attributes:
        starts: the first row of each row group.
        rows: indices of the rows.
        grids, sizes: integers, `(rows, 3)` and `(rows, 2)`.
        columns: the inputs' own columns.
        failures: the rows that failed.
    """

    starts: np.ndarray
    rows: np.ndarray
    ids: list[str]
    sources: list[str]
    grids: np.ndarray
    sizes: np.ndarray
    columns: pa.Table
    failures: list[Failure]

    @classmethod
    def read(cls, shard: Shard, firsts: Firsts, columns: Sequence[str] | None, embeddings: np.ndarray) -> _Part:
        """Read a shard whose embeddings are written to `embeddings`, as many as there are."""
        with stored.opened(shard.path) as file:
            schema = file.schema_arrow
            firsts.check(shard, schema)
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            others = () if columns is None else {*_extra_columns(schema)} - {*columns}
            table = file.read([name for name in schema.names if name not in (*_on_disk(schema), *others)])
            ok = stored.ok_rows(shard.path, table)
            if ok.sum() != len(embeddings):
                raise ValueError(
                    f"{shard.path}: {ok.sum():,} rows are ok, expected {len(embeddings):,}; it is being written, or "
                    f"{shard.folder / METADATA_FOLDER / NAME} is wrong: remove that"
                )
            filled = 0
            for block in stored.embedding_blocks(table["embedding"], embeddings.shape[1]):
                embeddings[filled : filled + len(block)] = block
                filled += len(block)
            small = table.drop_columns(["embedding"])
            good = small.filter(pa.array(ok))
            bad = small.filter(pc.call_function("equal", [table["status"], "failed"]))
            return cls(
                starts=np.cumsum([0, *groups])[:-1],
                rows=np.flatnonzero(ok),
                ids=good["id"].to_pylist(),
                sources=good["source"].to_pylist(),
                grids=_side_by_side(good, "grid_t", "grid_h", "grid_w"),
                sizes=_side_by_side(good, "height", "width"),
                columns=good.drop_columns([name for name in COLUMNS if name in good.column_names]),
                failures=[Failure(row["id"], row["source"], row["error"] or "") for row in bad.to_pylist()],
            )


def _side_by_side(table: pa.Table, *names: str) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def _read(shards: Sequence[Shard], survey: Survey, columns: Sequence[str] | None, memory_map: Path | None) -> Features:
    width = stored.embedding_width(survey.schemas[0])
    ends = np.cumsum([0, *survey.num_ok])
    embeddings = _space((int(ends[-1]), width), survey.dtype, memory_map)
    parts = [
        _Part.read(shard, survey.firsts, columns, embeddings[start:end])
        for shard, start, end in zip(shards, ends, ends[1:], strict=False)
    ]
    grids = np.concatenate([part.grids for part in parts]).astype(np.int64)
    places = Places(list(shards), _numbered([part.rows for part in parts]))
    on_disk = {
        name: StoredColumn(name, paths, [part.starts for part in parts], places.rows)
        for name in (TOKENS, THUMBNAIL)
        if any(paths := _paths_with(name, shards, survey.schemas))
    }
    return Features(
        ids=list(chain.from_iterable(part.ids for part in parts)),
        sources=list(chain.from_iterable(part.sources for part in parts)),
        embeddings=embeddings,
        grids=grids,
        sizes=np.concatenate([part.sizes for part in parts]).astype(np.int64),
        failures=[failure for part in parts for failure in part.failures],
        metadata=survey.metadata,
        tokens=_tokens(survey, on_disk, grids),
        thumbnails=Thumbnails(on_disk[THUMBNAIL]) if THUMBNAIL in on_disk else None,
        columns=pa.concat_tables([part.columns.replace_schema_metadata() for part in parts], promote_options="default"),
        places=places,
    )


def _tokens(survey: Survey, on_disk: Mapping[str, StoredColumn], grids: np.ndarray) -> Tokens | None:
    """The tokens of a table; `None` where it has none, or shards have different ones."""
    kinds = {(stored.token_width(each), stored.token_layers(each), stored.tokens_pool(each)) for each in survey.schemas}
    width, layers, pool = min(kinds, key=str)
    if width is None or len(kinds) > 1:
        return None
    return Tokens(on_disk[TOKENS], grids, width, layers, pool)


def _space(shape: tuple[int, int], dtype: np.dtype, memory_map: Path | None) -> np.ndarray:
    """An array to fill, in memory or in a file."""
    if memory_map is None or 0 in shape:  # nothing can be mapped of an empty file
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(memory_map, mode="w+", dtype=dtype, shape=shape)


def _extra_columns(schema: pa.Schema) -> list[str]:
    """The columns that a shard has of the inputs' own."""
    return [name for name in schema.names if name not in (*COLUMNS, *_on_disk(schema))]


def _on_disk(schema: pa.Schema) -> list[str]:
    """The columns that are not read into memory."""
    has_thumbnails = stored.metadata_of(schema).get("thumbnails", "") != ""
    return [name for name in (TOKENS, *([THUMBNAIL] if has_thumbnails else ())) if name in schema.names]


def _paths_with(name: str, shards: Sequence[Shard], schemas: Sequence[pa.Schema]) -> list[TablePath | None]:
    """The shards' files, `None` for those without a column on the disk."""
    return [shard.path if name in _on_disk(schema) else None for shard, schema in zip(shards, schemas, strict=True)]


def _numbered(rows: Sequence[np.ndarray]) -> np.ndarray:
    """`(N, 2)`: shard and row in it."""
    return np.concatenate(
        [np.stack([np.full(len(of_shard), number), of_shard], axis=1) for number, of_shard in enumerate(rows)]
    )

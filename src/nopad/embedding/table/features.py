"""Reading a features folder back as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from nopad.embedding.table import reader as stored
from nopad.embedding.table import writer as shards
from nopad.local_paths import check_local

_CACHED_GROUPS = 4
_MAX_RATIO = 1000  # of values to bytes; other programs may have compressed the file
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """An input without features, and why."""

    id: str
    source: str
    error: str


class Tokens(Sequence[np.ndarray]):
    """The tokens of every ok row, `(t, h, w, D)` float16, read from disk when indexed.

    One row group is read at a time (about 16 rows) and the last few are kept, so reading in order reads each once.
    """

    def __init__(
        self, paths: list[Path], starts: list[np.ndarray], places: np.ndarray, grids: np.ndarray, width: int
    ) -> None:
        self._paths = paths
        self._starts = starts  # per shard: the first row of each row group
        self._places = places  # (N, 2): shard and row in it
        self._grids = grids
        self._width = width
        self._group = lru_cache(_CACHED_GROUPS)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._paths, self._starts, self._places, self._grids, self._width)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"tokens index {index}, expected {-len(self)} to {len(self) - 1}")
        shard, row = self._places[index]
        starts = self._starts[shard]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        t, h, w = self._grids[index]
        raw = self._group(int(shard), group)[int(row - starts[group])].as_buffer()
        size = int(t * h * w) * self._width * 2
        if raw is None or raw.size != size:
            found = "none" if raw is None else raw.size
            expected = f"tokens of {size} bytes in row {row}, found {found}"
            raise ValueError(f"{self._paths[shard]}: changed since it was read ({expected}); read the folder again")
        # A copy: a view would be read-only and keep its whole row group in memory.
        return np.frombuffer(raw, "<f2").reshape(t, h, w, self._width).astype(np.float16)

    def _read_group(self, shard: int, group: int) -> pa.ChunkedArray:
        with stored.opened(self._paths[shard]) as file:
            return file.read_row_group(group, ["tokens"])["tokens"]

    def __repr__(self) -> str:
        return f"Tokens({len(self)} × (t, h, w, {self._width}) float16)"


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """The table of a features folder, its ok rows in input order.

    Attributes:
        ids, sources: which input each row is of.
        embeddings: `(N, D)` float32 or float16, as the job stored them.
        grids: `(N, 3)` patches: frames, rows, columns.
        sizes: `(N, 2)` pixels of the upright pictures: height, width.
        failures: the inputs without features.
        metadata: what the job recorded: model, revision, preprocessing and so on.
        tokens: see `Tokens`; None where the job did not store them.
    """

    ids: list[str]
    sources: list[str]
    embeddings: np.ndarray
    grids: np.ndarray
    sizes: np.ndarray
    failures: list[Failure]
    metadata: dict[str, str]
    tokens: Tokens | None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        embeddings = f"embeddings {self.embeddings.dtype} {self.embeddings.shape}"
        tokens = "no tokens" if self.tokens is None else "tokens"
        return f"Features({len(self)} ok, {len(self.failures)} failed, {embeddings}, {tokens})"


def read_features(folder: str | Path, *, partial: bool = False) -> Features:
    """Read what `nopad embed --out folder` wrote; embeddings come into memory, tokens stay on disk until indexed.

    Args:
        partial: take the shards of an unfinished job as they are.

    Raises:
        ValueError: no such folder, no shards, shards missing (unless `partial`), shards of different jobs, a shard that
            is damaged or has other columns, types or rows than a job writes; the message says which and what to do.
        OSError: a shard that cannot be opened or read.
    """
    check_local("folder", folder)
    numbered = _find(Path(folder), partial)
    schema, rows = _survey(numbered)
    paths = list(numbered.values())
    width, token_width = stored.embedding_width(schema), stored.token_width(schema)
    dtype = schema.field("embedding").type.value_type.to_pandas_dtype()

    embeddings = np.empty((rows, width), dtype)  # cut to the ok rows below
    ids: list[str] = []
    sources: list[str] = []
    failures: list[Failure] = []
    starts, places, grids, sizes = [], [], [], []
    for number, path in enumerate(paths):
        with stored.opened(path) as file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            table = file.read(list(shards.COLUMNS))
            ok = stored.ok_rows(path, table)
            filled = len(ids)
            for block in stored.embedding_blocks(table["embedding"], width):
                embeddings[filled : filled + len(block)] = block
                filled += len(block)
            small = table.drop_columns(["embedding"])
            good, bad = small.filter(pa.array(ok)), small.filter(pa.array(~ok))
            ids += good["id"].to_pylist()
            sources += good["source"].to_pylist()
            failures += [Failure(row["id"], row["source"], row["error"] or "") for row in bad.to_pylist()]
        starts.append(np.cumsum([0, *groups])[:-1])
        places.append(np.stack([np.full(len(good), number), np.flatnonzero(ok)], axis=1))
        grids.append(np.stack([good[name].to_numpy() for name in ("grid_t", "grid_h", "grid_w")], axis=1))
        sizes.append(np.stack([good[name].to_numpy() for name in ("height", "width")], axis=1))

    grid = np.concatenate(grids).astype(np.int64)
    tokens = None if token_width is None else Tokens(paths, starts, np.concatenate(places), grid, token_width)
    return Features(
        ids=ids,
        sources=sources,
        embeddings=embeddings[: len(ids)],
        grids=grid,
        sizes=np.concatenate(sizes).astype(np.int64),
        failures=failures,
        metadata={key: value for key, value in stored.metadata_of(schema).items() if key != "shard"},
        tokens=tokens,
    )


read = read_features  # an alias: the name until nopad 0.2


def _find(folder: Path, partial: bool) -> dict[int, Path]:
    """The shards of the folder's one job, by number."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}, expected the folder given to `nopad embed --out`")
    jobs: dict[tuple[int, str], dict[int, Path]] = {}
    for path in folder.iterdir():
        if name := shards.parse_shard_name(path.name):
            number, of, fingerprint = name
            jobs.setdefault((of, fingerprint), {})[number] = path
    if not jobs:
        begun = (folder / shards.METADATA_FOLDER).is_dir()
        why = "no shard of its job is finished; run `nopad embed` again" if begun else "expected shard-….parquet files"
        raise ValueError(f"{folder} has no shards: {why}")
    if len(jobs) > 1:
        found = ", ".join(f"{len(jobs[key])} of {key[0]} with fingerprint {key[1]}" for key in sorted(jobs))
        raise ValueError(f"{folder} has shards of {len(jobs)} jobs: {found}; keep one job's shards in a folder")
    [((of, _), numbered)] = jobs.items()
    if beyond := sorted(number for number in numbered if number >= of):
        raise ValueError(f"{numbered[beyond[0]]}: shard {beyond[0]} of {of}, expected 0 to {of - 1}")
    missing = [number for number in range(of) if number not in numbered]
    if missing and not partial:
        which = ", ".join(f"{number:05}" for number in missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        what = "run `nopad embed` again to finish it, or read_features(folder, partial=True)"
        raise ValueError(f"{folder} is unfinished: {len(missing)} of {of} shards are missing ({which}); {what}")
    return {number: numbered[number] for number in sorted(numbered)}


def _survey(numbered: dict[int, Path]) -> tuple[pa.Schema, int]:
    """The schema that all shards share, and how many of their rows are ok."""
    schema, rows = None, 0
    first = next(iter(numbered.values()))
    for number, path in numbered.items():
        with stored.opened(path) as file:
            schema = schema or file.schema_arrow
            if not file.schema_arrow.equals(schema):
                raise ValueError(f"{path}: other columns than {first}; run the job again into an empty folder")
            expected = {**stored.metadata_of(schema), "shard": str(number)}
            found = {"shard": str(number), **stored.metadata_of(file.schema_arrow)}  # nopad 0.1 did not write it
            if found["shard"] != str(number):
                raise ValueError(f"{path}: a copy of shard {found['shard']}; move it away and run the job again")
            if others := [key for key in {**expected, **found} if expected.get(key) != found.get(key)]:
                told = f"{others[0]} {found.get(others[0], 'none')}, {expected.get(others[0], 'none')} in {first}"
                raise ValueError(f"{path}: of another job: {told}; move it away and run the job again")
            ok = int(stored.ok_rows(path, file.read(["status"])).sum())
            width = stored.embedding_width(schema)
            if ok * width > _MAX_RATIO * path.stat().st_size:
                raise stored.damaged(path, f"{ok} rows of {width} values, more than it can hold")
            rows += ok
    assert schema is not None
    return schema, rows

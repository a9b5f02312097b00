"""An index beside a table, for searches that do not compare every row.

faiss, since an inverted file is built shard by shard in one pass over the table: what is finished is kept when building
is stopped, and a table that grows adds parts. A graph (HNSW, as in usearch) would have to be built as a whole. Vectors
lie there in 8 bits per value; rows that it chooses are compared by the table's own vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nopad.atomic import atomic_write
from nopad.embedding.table.names import METADATA_FOLDER
from nopad.embedding.table.paths import TablePath
from nopad.json_files import read_json
from nopad.preprocessing.files import open_regular
from nopad.search.clusters import import_faiss
from nopad.search.exact import blocks, default_device, top_k, unit
from nopad.search.places import Shard

logger = logging.getLogger(__name__)

PART_ROWS = 1 << 18
"""Rows of a part, of whole shards."""

_CPU = torch.device("cpu")
_OVERSAMPLE = 4
_NUM_QUERIES, _RECALL_AT = 256, 10
_FOLDER = "index"


@dataclass(frozen=True)
class Index:
    """An inverted file in memory.

    Attributes:
        ivf: faiss' index, whose ids are the table's rows.
        num_probes: lists that a search looks into.
        recall: of the 10 nearest rows by exact search, the share that it found, measured with rows of the table.
        num_rows: of the table.
    """

    ivf: Any
    num_probes: int
    recall: float
    num_rows: int

    def search(self, vector: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and rows of about the `k` nearest, best first."""
        rows = _candidates(self.ivf, unit(vector[None], _CPU).numpy(), k, self.num_probes)[0]
        rows = np.sort(rows[rows >= 0])
        if len(rows) and rows[-1] >= self.num_rows:
            raise ValueError(f"the index is damaged: it has row {rows[-1]} of {self.num_rows}; build it again")
        (scores,), (order,) = top_k(embeddings[rows], vector[None], k, _CPU)
        return scores, rows[order]


def build(
    shards: Sequence[Shard],
    embeddings: np.ndarray,
    rows: np.ndarray,
    *,
    recall: float = 0.95,
    progress: Callable[[str], None] = logger.info,
) -> Index:
    """Build an index beside a table; what an earlier call has finished is taken as it is.

    Args:
        shards, embeddings, rows: of one table, see `Features` and `Places`.
        recall: share of the 10 nearest rows that is found on average.
        progress: called with what is done, in words.

    Raises:
        ValueError: several tables, an empty one, or a `recall` that is not between 0 and 1.
        OSError: the folder cannot be written.
        ImportError: no faiss.
    """
    faiss = import_faiss()
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
        raise ValueError(f"recall: expected a share above 0, at most 1, got {recall!r}")
    folder = _folder(shards)
    if folder is None:
        raise ValueError(
            "an index lies beside one table in a folder of this machine; build it for each of them, and copy a table "
            "that lies in a store to a folder first"
        )
    if not len(embeddings):
        raise ValueError("the table has no rows to build an index of")
    folder.mkdir(exist_ok=True)
    empty = _trained(folder, embeddings, progress)
    counts = np.bincount(rows[:, 0], minlength=len(shards))
    parts = list(_parts(shards, counts))
    for number, (name, start, stop) in enumerate(parts):
        if not (folder / name).exists():
            part = faiss.clone_index(empty)
            for offset, block in blocks(embeddings[start:stop]):
                part.add_with_ids(unit(block, _CPU).numpy(), np.arange(offset, offset + len(block)))
            _write(folder / name, faiss.serialize_index(part).tobytes())
        progress(f"part {number + 1} of {len(parts)}")
    ivf = _merged(folder, empty, parts)
    num_probes, measured = _measure(ivf, embeddings, recall)
    record = {"parts": [name for name, *_ in parts], "num_probes": num_probes, "recall": measured}
    _write(folder / "index.json", json.dumps(record).encode())
    for path in folder.glob("part-*.faiss"):
        if path.name not in record["parts"]:
            path.unlink()
    return Index(ivf, num_probes, measured, len(embeddings))


def open_index(shards: Sequence[Shard], rows: np.ndarray) -> Index | None:
    """The index beside a table, `None` where there is none or the table has changed since.

    Raises:
        ValueError: it is damaged.
        ImportError: no faiss.
    """
    folder = _folder(shards)
    if folder is None or not (folder / "index.json").exists():
        return None
    parts = list(_parts(shards, np.bincount(rows[:, 0], minlength=len(shards))))
    try:
        record = read_json(folder / "index.json")
        num_probes, recall = int(record["num_probes"]), float(record["recall"])
        is_current = record["parts"] == [name for name, *_ in parts]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder}: damaged ({error}); remove it and build the index again") from error
    if not is_current:
        logger.warning("%s is of another state of the table and not used; build the index again", folder)
        return None
    return Index(_merged(folder, _load(folder / "trained.faiss"), parts), num_probes, recall, len(rows))


def _folder(shards: Sequence[Shard]) -> Path | None:
    folders = {shard.folder for shard in shards}
    metadata_folder = folders.pop() / METADATA_FOLDER
    if folders or not isinstance(metadata_folder, Path) or not metadata_folder.is_dir():
        return None
    return metadata_folder / _FOLDER


def _parts(shards: Sequence[Shard], counts: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """File name, first row and end of each part; the name follows from what is in its shards."""
    digest, start, stop, size = hashlib.sha256(), 0, 0, 0
    for shard, count in zip(shards, counts, strict=True):
        digest.update(_footer(shard.path))
        stop += int(count)
        size += 1
        if stop - start >= PART_ROWS or shard is shards[-1]:
            yield f"part-{digest.hexdigest()[:16]}-{size}.faiss", start, stop
            digest, start, size = hashlib.sha256(), stop, 0


def _footer(path: TablePath) -> bytes:
    """The end of a shard: where its pages are and what statistics they have."""
    assert isinstance(path, Path)  # else there is no folder of an index
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(8)[:4], "little")
        file.seek(max(0, size - 8 - length))
        return size.to_bytes(8, "little") + file.read()


def _trained(folder: Path, embeddings: np.ndarray, progress: Callable[[str], None]) -> Any:
    """An index without rows; made anew where the table has outgrown it."""
    faiss = import_faiss()
    path, width = folder / "trained.faiss", embeddings.shape[1]
    num_lists = max(1, min(round(4 * math.sqrt(len(embeddings))), len(embeddings) // 40))
    if path.exists():
        empty = _load(path)
        if empty.d == width and num_lists <= 2 * empty.nlist:
            return empty
        for part in folder.glob("part-*.faiss"):
            part.unlink()
    progress(f"choosing {num_lists:,} lists")
    rng = np.random.default_rng(0)
    number = min(len(embeddings), 64 * num_lists)
    sample = np.sort(rng.choice(len(embeddings), number, replace=False))
    empty = faiss.index_factory(width, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    empty.cp.min_points_per_centroid = 1
    empty.train(unit(embeddings[sample], _CPU).numpy())
    _write(path, faiss.serialize_index(empty).tobytes())
    return empty


def _merged(folder: Path, empty: Any, parts: Sequence[tuple[str, int, int]]) -> Any:
    merged = import_faiss().clone_index(empty)
    for name, start, stop in parts:
        part = _load(folder / name)
        try:
            if part.ntotal != stop - start or part.d != merged.d:
                raise RuntimeError(f"{part.ntotal} rows of {part.d} values")
            merged.merge_from(part, start)
        except RuntimeError as error:
            raise ValueError(f"{folder / name}: damaged; remove {folder} and build the index again") from error
    return merged


def _load(path: Path) -> Any:
    faiss = import_faiss()
    try:
        with open_regular(os.fsencode(path)) as file:
            index = faiss.deserialize_index(np.frombuffer(file.readall(), np.uint8))
        if not isinstance(index, faiss.IndexIVF):
            raise RuntimeError(f"got {type(index).__name__}")
    except (OSError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path}: damaged; remove {path.parent} and build the index again") from error
    return index


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def _candidates(ivf: Any, queries: np.ndarray, k: int, num_probes: int) -> np.ndarray:
    parameters = import_faiss().SearchParametersIVF(nprobe=num_probes)
    return ivf.search(queries, min(_OVERSAMPLE * k, ivf.ntotal), params=parameters)[1]


def _measure(ivf: Any, embeddings: np.ndarray, recall: float) -> tuple[int, float]:
    """The fewest lists, a power of two, that give a recall, and the recall that they give."""
    rng = np.random.default_rng(1)
    rows = np.sort(rng.choice(len(embeddings), min(len(embeddings), _NUM_QUERIES), replace=False))
    queries = unit(embeddings[rows], _CPU).numpy()
    k = _RECALL_AT + 1
    nearest = top_k(embeddings, queries, k, default_device())[1]
    expected = [set(candidates.tolist()) - {row} for candidates, row in zip(nearest, rows.tolist(), strict=True)]
    num_probes = 1
    while True:
        candidates = _candidates(ivf, queries, k, num_probes)
        hits = sum(len(near.intersection(those.tolist())) for near, those in zip(expected, candidates, strict=True))
        measured = hits / max(1, sum(map(len, expected)))
        if measured >= recall or num_probes >= ivf.nlist:
            return num_probes, measured
        num_probes = min(2 * num_probes, ivf.nlist)

"""Rows and shards of random features."""

from pathlib import Path

import numpy as np

from nopad.embedding.table.format import Row, ShardFormat
from nopad.embedding.table.writer import write_shard

PLAIN = ShardFormat(dimension=3)
FORMATS = {
    "plain": PLAIN,
    "variable": ShardFormat(dimension=3, embedding_list="variable"),
    "float16": ShardFormat(dimension=3, embedding_dtype="float16"),
    "variable float16": ShardFormat(dimension=3, embedding_dtype="float16", embedding_list="variable"),
    "tokens": ShardFormat(dimension=3, token_dimension=2),
}


def ok_row(number: int, format: ShardFormat = PLAIN, grid: tuple[int, int, int] = (1, 2, 3)) -> Row:
    t, h, w = grid
    random = np.random.default_rng(number)
    tokens = None
    if format.token_dimension is not None:
        tokens = random.standard_normal((t * h * w, format.token_dimension)).astype(np.float16)
    embedding = random.standard_normal(format.dimension).astype(format.embedding_dtype)
    return Row(f"{number}.jpg", "photos", "ok", None, w * 14, h * 14, grid, embedding, tokens)


def write(path: Path, rows, format: ShardFormat = PLAIN, metadata=None) -> Path:
    write_shard(path, rows, format, metadata or {}, temporary=path.with_suffix(".part"))
    return path

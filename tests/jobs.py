"""Jobs to run, and what their tables hold."""

from pathlib import Path

import pyarrow.parquet as pq

import nopad
from nopad.embedding.summary import Summary


def embed(sources, out: Path, model, **options) -> Summary:
    return nopad.embed(sources, out, model=model, **{"shard_size": 5, "workers": 2, **options})


def table(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the shards."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def errors(folder: Path) -> dict[str, str]:
    return {row["id"]: row["error"] for row in rows(folder) if row["status"] == "failed"}

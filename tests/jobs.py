"""Jobs to run, and what their tables hold."""

import io
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

import nopad
from nopad.embedding import table_run
from nopad.embedding.summary import Summary


def embed(sources, out: Path, model, **options) -> Summary:
    return nopad.embed(sources, out, model=model, **{"shard_size": 5, "workers": 2, **options})


def begin(sources, out: Path, model, **options) -> Summary:
    """Begin a job, which is stopped once its sources are listed, before its first shard."""
    stop, list_sources = threading.Event(), table_run.list_sources

    def listed(*arguments, **options):
        listing = list_sources(*arguments, **options)
        stop.set()
        return listing

    with mock.patch.object(table_run, "list_sources", listed):
        return embed(sources, out, model, stop=stop, **options)


def table(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the shards."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def errors(folder: Path) -> dict[str, str]:
    return {row["id"]: row["error"] for row in rows(folder) if row["status"] == "failed"}


@contextmanager
def logged() -> Iterator[io.StringIO]:
    """What the library logs meanwhile, in any thread."""
    handler = logging.StreamHandler(messages := io.StringIO())
    logger = logging.getLogger("nopad")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)

"""Rows of a shard, so that a table's folder has no more files than can be listed fast."""

from __future__ import annotations

from collections.abc import Mapping

from nopad.counts import counted

SHARD_SIZE, SHARD_SIZE_WITH_TOKENS = 2048, 512
"""Rows of a shard, unless there are too many inputs."""

MAX_FILES = 10_000
"""Files in a folder, before listing it takes long."""

MAX_SHARD_SIZE = 131_072
"""The most rows of a shard by default: those of two are in memory, 400 MB of vectors each at 768 values."""


def default_shard_size(num_inputs: int, begun: Mapping[str, str], *, tokens: bool) -> int:
    """Rows of a shard where the user gave none.

    It doubles until there are at most `MAX_FILES` shards, or `MAX_SHARD_SIZE` is reached. With tokens it stays, since
    the memory would not hold more.

    Args:
        begun: the record of the job that was begun in the folder. Its size stays, if it is a default of any number.
        tokens: whether they are stored.
    """
    smallest = SHARD_SIZE_WITH_TOKENS if tokens else SHARD_SIZE
    sizes = [smallest]
    while not tokens and sizes[-1] < MAX_SHARD_SIZE:
        sizes.append(2 * sizes[-1])
    by_record = {str(size): size for size in sizes}
    if (size := by_record.get(begun.get("shard_size", ""))) is not None:
        return size
    return next((size for size in sizes if size * MAX_FILES >= num_inputs), sizes[-1])


def too_many_files(num_inputs: int, shard_size: int) -> str:
    """What to change where a table would have more than `MAX_FILES` files; empty where it has not."""
    if (files := -(-num_inputs // shard_size)) <= MAX_FILES:
        return ""
    size = -(-num_inputs // MAX_FILES)
    return (
        f"{files:,} files in one folder: --shard-size {size} makes {counted(-(-num_inputs // size), 'file')}, or split "
        f"the sources into several tables, which are read as one"
    )

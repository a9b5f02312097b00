"""Rows of a shard, so that a table's folder has no more files than can be listed fast."""

from __future__ import annotations

from collections.abc import Mapping

SHARD_SIZE, SHARD_SIZE_WITH_TOKENS = 2048, 512
"""Rows of a shard, unless there are many inputs."""

UNIT_FACTOR = 10
"""A tar or row group of so many times the rows of a shard is one shard, where there are no tokens."""

MIN_BYTES, MAX_BYTES = 1 << 30, 10 << 30
"""Where the user gave no rows: tars and row groups are joined up to so many bytes, and what has more than that is
divided. A shard of 1 GiB has hundreds of photos, so that little of its packs is empty; 10 GiB are 2,048 of 5 MB."""

ENOUGH_FILES, ENOUGH_ROWS = 2_000, 32_768
"""With more files than that shards grow until they have so many rows: 128 MiB of vectors of 1,024 values, the least
that readers of Parquet like a file to have. No fewer than half of these files are left, so that many actors have work
to the end and little is lost with one."""

MAX_FILES = 10_000
"""Files in a folder, before listing it takes long."""

MAX_SHARD_SIZE = 131_072
"""The most rows of a shard by default: 512 MiB of vectors of 1,024 values."""

ShardSize = int | tuple[int, int]
"""Rows of a shard at most; or the number up to which tars and row groups are joined, and that above which one is
divided."""


def default_shard_size(num_inputs: int, begun: Mapping[str, str], *, tokens: bool) -> ShardSize:
    """Rows of a shard where the user gave none.

    It doubles until there are at most `ENOUGH_FILES` shards, from `ENOUGH_ROWS` on until there are at most `MAX_FILES`
    or `MAX_SHARD_SIZE` is reached. With tokens it stays, since the memory would not hold more.

    Args:
        begun: the record of the job that was begun in the folder. Its size stays, if it is a default of any number.
        tokens: whether they are stored.
    """
    sizes = [SHARD_SIZE_WITH_TOKENS if tokens else SHARD_SIZE]
    while not tokens and sizes[-1] < MAX_SHARD_SIZE:
        sizes.append(2 * sizes[-1])
    defaults: list[ShardSize] = [*sizes]
    if not tokens:
        defaults = [(size, min(UNIT_FACTOR * size, MAX_SHARD_SIZE)) for size in sizes]
    by_record = {describe_size(size): size for size in (*sizes, *defaults)}  # the first are those of older jobs
    if (size := by_record.get(begun.get("shard_size", ""))) is not None:
        return size
    for size, default in zip(sizes, defaults, strict=True):
        if size * (MAX_FILES if size >= ENOUGH_ROWS else ENOUGH_FILES) >= num_inputs:
            return default
    return defaults[-1]


def describe_size(size: ShardSize) -> str:
    """A size as it is typed, and recorded."""
    return "..".join(map(str, size)) if isinstance(size, tuple) else str(size)


def row_limits(size: ShardSize) -> tuple[int, int]:
    """Rows up to which units are joined, and above which one is divided."""
    return size if isinstance(size, tuple) else (size, size)

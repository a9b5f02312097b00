"""Names of what lies in a table's folder; nothing heavy is imported here."""

from __future__ import annotations

import re

METADATA_FOLDER = ".nopad"
"""Folder within the table of what a job writes beside its shards."""

_NAME = re.compile(r"shard-(\d{5,})-of-(\d{5,})-(.+)\.parquet")


def shard_name(number: int, of: int, fingerprint: str) -> str:
    """File name of shard `number`, counted from 0, of `of` shards. Names sort as numbers do, however many there are."""
    digits = max(5, len(str(of)))
    return f"shard-{number:0{digits}}-of-{of:05}-{fingerprint}.parquet"


def parse_shard_name(name: str) -> tuple[int, int, str] | None:
    """`(number, of, fingerprint)` of a shard's file name, None for other names, such as one of more digits."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    parsed = int(match[1]), int(match[2]), match[3]
    # Of 100,000 shards or more, earlier versions wrote the first numbers with five digits.
    names = (shard_name(*parsed), f"shard-{parsed[0]:05}-of-{parsed[1]:05}-{parsed[2]}.parquet")
    return parsed if name in names else None

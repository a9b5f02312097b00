"""The shards of a folder's table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nopad.counts import are, counted
from nopad.embedding.table import reader as stored
from nopad.embedding.table.names import METADATA_FOLDER, parse_shard_name
from nopad.embedding.table.paths import TablePath, table_path
from nopad.search.places import Shard

_SHOWN = 5
_NO_TABLE = "expected shard-….parquet files, as `nopad embed` writes them; images are named one by one, as photos/*.jpg"


def shards_of(folder: str | Path | Sequence[str | Path], partial: bool) -> list[Shard]:
    """The shards of a table or of several, in order.

    Raises:
        ValueError: see `read_features`.
    """
    folders: list[Any] = list(folder) if isinstance(folder, Sequence) and not isinstance(folder, str) else [folder]
    if not folders:
        raise ValueError("folder: expected a folder or a list of them, got none")
    for each in folders:
        if not isinstance(each, str | os.PathLike):
            raise ValueError(f"folder: expected a path or a list of them, got {type(each).__name__}")
    paths = [table_path("folder", each) for each in folders]
    real = [os.path.realpath(each) if isinstance(each, Path) else str(each) for each in paths]
    if twice := [each for number, each in enumerate(folders) if real[number] in real[:number]]:
        raise ValueError(f"folder: {os.fspath(twice[0])!r} is named twice, and its rows would be there twice")
    return [shard for each in paths for shard in _find(each, partial)]


def _find(folder: TablePath, partial: bool) -> list[Shard]:
    """The shards of a folder's table in order: those of its first job, then those of its updates."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}, expected the folder given to `nopad embed --out`")
    jobs: dict[tuple[int, str], dict[int, TablePath]] = {}
    for path in folder.iterdir():
        if name := parse_shard_name(path.name):
            number, of, fingerprint = name
            jobs.setdefault((of, fingerprint), {})[number] = path
    if not jobs:
        begun = (folder / METADATA_FOLDER).is_dir()
        why = "no shard of its job is finished; run `nopad embed` again" if begun else _NO_TABLE
        raise ValueError(f"{folder} has no shards: {why}")
    ordered = list(jobs) if len(jobs) == 1 else _with_updates(folder, jobs)
    return [shard for key in ordered for shard in _complete(folder, *key, jobs[key], partial)]


def _with_updates(folder: TablePath, jobs: Mapping[tuple[int, str], Mapping[int, TablePath]]) -> list[tuple[int, str]]:
    """The jobs of one table in order, by the metadata of their shards."""
    metadata = {key: stored.read_metadata(next(iter(paths.values()))) for key, paths in jobs.items()}
    ordered = sorted(jobs, key=lambda key: int(metadata[key].get("update", "0")))
    first = ordered[0]
    numbers = [metadata[key].get("update", "0") for key in ordered]
    same = all(metadata[key].get("table") == first[1] for key in ordered[1:])
    if not same or numbers != [str(number) for number in range(len(ordered))]:
        got = ", ".join(f"{len(jobs[key])} of {key[0]} with fingerprint {key[1]}" for key in sorted(jobs))
        raise ValueError(f"{folder} has shards of {len(jobs)} jobs: {got}; keep one job's shards in a folder")
    return ordered


def _complete(
    folder: TablePath, of: int, fingerprint: str, numbered: Mapping[int, TablePath], partial: bool
) -> list[Shard]:
    """The shards of one job in order."""
    if beyond := sorted(number for number in numbered if number >= of):
        raise ValueError(f"{numbered[beyond[0]]}: shard {beyond[0]} of {of}, expected 0 to {of - 1}")
    missing = [number for number in range(of) if number not in numbered]
    if missing and not partial:
        which = ", ".join(f"{number:05}" for number in missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        what = "run `nopad embed` again to finish it, or read_features(folder, partial=True)"
        gone = f"{len(missing)} of {counted(of, 'shard')} {are(len(missing))}"
        raise ValueError(f"{folder} is unfinished: {gone} missing ({which}); {what}")
    return [Shard(folder, numbered[number], fingerprint, number) for number in sorted(numbered)]

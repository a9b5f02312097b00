"""Where the files of a dataset lie that `datasets` saved to disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nopad.json_files import read_json
from nopad.local_paths import utf8


@dataclass(frozen=True, slots=True)
class SavedSplit:
    """One split of a dataset saved by `datasets`, named `""` where there are none, and its Arrow files in order."""

    name: str
    files: tuple[bytes, ...]


def is_dataset(folder: str) -> bool:
    """Whether a folder was written by `datasets`' `save_to_disk`."""
    has = {name: os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "state.json")}
    return all(has.values()) or os.path.isfile(os.path.join(folder, "dataset_dict.json"))


def saved_splits(folder: bytes) -> list[SavedSplit]:
    """The splits of a saved dataset, as its JSON files list them.

    Raises:
        OSError, ValueError, LookupError, TypeError: they cannot be read, or name files elsewhere.
    """
    whole = os.path.join(folder, b"dataset_dict.json")
    if not os.path.isfile(whole):
        return [SavedSplit("", _data_files(folder))]
    names = _plain(read_json(Path(os.fsdecode(whole)))["splits"])
    return [SavedSplit(name, _data_files(os.path.join(folder, utf8(name)))) for name in names]


def files_of(folder: bytes, split: str) -> tuple[bytes, ...]:
    """The Arrow files of one split of a saved dataset.

    Raises:
        ValueError: no such split; else as `saved_splits`.
    """
    for saved in saved_splits(folder):
        if saved.name == split:
            return saved.files
    raise ValueError(f"it has no split {split!r} any more")


def _data_files(folder: bytes) -> tuple[bytes, ...]:
    state = read_json(Path(os.fsdecode(folder), "state.json"))
    if state.get("_indices_data_files"):
        raise ValueError("it was saved by an old version of datasets; load and save it again")
    names = _plain([file["filename"] for file in state["_data_files"]])
    return tuple(os.path.join(folder, utf8(name)) for name in names)


def _plain(names: list[str]) -> list[str]:
    """Names of files or folders beside the one that lists them, each once."""
    for name in names:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"expected the name of a file or folder in it, got {name!r}")
    if len({*names}) < len(names):
        raise ValueError(f"{len(names)} names, of which {len({*names})} differ; expected each once")
    return names

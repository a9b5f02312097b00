"""Sources in stores and on servers: prefixes as folders, and globs over them."""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Callable, Iterator

from nopad.embedding.inputs.names import is_hidden
from nopad.embedding.inputs.reaching import retry
from nopad.embedding.inputs.walk import Hidden, PathEntry
from nopad.embedding.table.names import METADATA_FOLDER, parse_shard_name
from nopad.local_paths import utf8
from nopad.storage.addresses import Address
from nopad.storage.store import Stored
from nopad.storage.stores import can_list, store_of

_JOB = f"{METADATA_FOLDER}/job.json"


def is_object(address: str, timeout: float | None) -> bool:
    """Whether an address is that of an object, not of a prefix.

    Raises:
        OSError: it cannot be reached.
    """
    parts = Address.of(address)
    if can_list(parts) and (not parts.key or address.endswith("/")):
        return False
    try:
        retry(lambda: store_of(parts, timeout).stat(parts.key))
    except FileNotFoundError:
        return False
    return True


def below(address: str, hidden: Hidden, check: Callable[[], None], timeout: float | None) -> Iterator[PathEntry]:
    """The objects below a prefix, in the order of the bytes of their keys; tables of features are passed over.

    Args:
        check: called for each object; may raise.

    Raises:
        ValueError: a web server, which cannot be listed; or a dataset that was saved to disk.
        FileNotFoundError: there are none.
        OSError: it cannot be reached.
    """
    stored = _stored(address, check, timeout)
    names = [*stored]
    if not names:
        raise FileNotFoundError(errno.ENOENT, "No such object, and none below it")
    if {"dataset_dict.json"} <= {*names} or {"dataset_info.json", "state.json"} <= {*names}:
        raise ValueError(f"{address}: a dataset that was saved to disk is read from local folders alone; copy it first")
    tables = {name.removesuffix(_JOB) for name in names if name.endswith(_JOB)}
    for name in names:
        *folders, base = name.split("/")
        if METADATA_FOLDER in folders or (parse_shard_name(base) and name[: -len(base)] in tables):
            continue
        if not _is_left_out(address, folders, base, hidden):
            yield PathEntry(name, stored=stored[name])


def match(
    address: str, parts: tuple[str, ...], hidden: Hidden, check: Callable[[], None], timeout: float | None
) -> list[PathEntry]:
    """What a glob's parts match below a prefix; see `nopad.embedding.inputs.walk.match`."""
    matches = set()
    for name, stored in _stored(address, check, timeout).items():
        steps = tuple(name.split("/"))
        for depth in range(1, len(steps) + 1):
            is_folder = depth < len(steps)
            if is_folder and "**" in parts:  # which finds the files in it
                continue
            if METADATA_FOLDER not in steps and _matches(steps[:depth], parts):
                if not _is_left_out(address, list(steps[: depth - 1]), steps[depth - 1], hidden):
                    object_ = None if is_folder else stored
                    matches.add(PathEntry("/".join(steps[:depth]), is_folder, stored=object_))
                break
    return sorted(matches, key=lambda entry: utf8(entry.path))


def _stored(address: str, check: Callable[[], None], timeout: float | None) -> dict[str, Stored]:
    """The objects below a prefix by their names there, in the order of the bytes of these."""
    parts = Address.of(address)
    if not can_list(parts):
        raise ValueError(f"{address}: {parts.scheme}:// cannot be listed; name its files, for example in a list file")
    prefix = f"{parts.key}/" if parts.key else ""

    def listed() -> list[Stored]:
        found = []
        for stored in store_of(parts, timeout).list(prefix):
            check()
            found.append(stored)
        return found

    by_name = {stored.key.removeprefix(prefix): stored for stored in retry(listed) if _is_below(stored.key, prefix)}
    return {name: by_name[name] for name in sorted(by_name, key=utf8)}


def _is_below(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key != prefix and not key.endswith("/")


def _is_left_out(address: str, folders: list[str], base: str, hidden: Hidden) -> bool:
    """Whether an object is hidden, by its name or by a folder that it is in; each is counted once."""
    for depth, folder in enumerate(folders):
        if is_hidden(folder, is_folder=True) and hidden.leaves_out("/".join([address, *folders[:depth]]), folder, True):
            return True
    return hidden.leaves_out("/".join([address, *folders]), base, False)


def _matches(steps: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    if not parts or not steps:
        return not parts and not steps
    if parts[0] == "**":
        rest = parts[1:] or ("*",)
        return _matches(steps, rest) or (not steps[0].startswith(".") and _matches(steps[1:], parts))
    is_match = fnmatch.fnmatchcase(steps[0], parts[0]) and (parts[0][0] == "." or steps[0][0] != ".")
    return is_match and _matches(steps[1:], parts[1:])

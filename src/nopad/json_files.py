"""JSON objects from files that others have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nopad.local_paths import check_regular

MAX_JSON_BYTES = 16 << 20
"""Limit of a file. An index of 100,000 tensors has about 10 MB."""
MAX_JSON_DEPTH = 50


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: no file, too large, no JSON or no object, nested too deeply, or a key twice with different values.
    """
    check_regular(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {path.stat().st_size}")
    return parse_json(path.read_bytes(), str(path))


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object from its bytes.

    Args:
        name: name of its file, for messages.

    Raises:
        ValueError: see `read_json`.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_each_key_once)
        _check_depth(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(content).__name__}")
    return content


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = sorted({key for key, value in pairs if value != content[key]})
        if twice:
            raise ValueError(f"different values of one key: {twice[:10]}")
    return content


def _check_depth(content: Any) -> None:
    level: list[Any] = [[content]]
    for _ in range(MAX_JSON_DEPTH + 1):
        inside = [each.values() if isinstance(each, dict) else each for each in level]
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(f"objects and lists in each other, more than {MAX_JSON_DEPTH} deep")

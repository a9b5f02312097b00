"""Kinds of options of a job: how one is typed on the command line, and the check of its value.

Nothing heavy is imported here, see `nopad.embedding.settings`.
"""

from __future__ import annotations

import math
import string
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Any

from nopad.counts import check_count, is_number
from nopad.environment import check_device
from nopad.preprocessing.limits import THUMBNAIL_SIDES
from nopad.preprocessing.size import Size, check_size, parse_size

_BYTES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MIN_STEP, _MAX_STEP = 1e-6, 1e8  # seconds from one part of a video to the next: times are kept in microseconds
_SECONDS = {"": 1, "s": 1, "ms": 1e-3, "m": 60, "h": 3600}


def option(default: Any, help: str, check: Any, *, recorded: bool, **argument: Any) -> Any:
    """A field of `Settings`.

    Args:
        default: `None` where something else gives the value; `None` is then not checked.
        help: of the command line, which adds a default that is not `None`.
        check: a function of name and value that raises ValueError.
        recorded: whether it is part of the job's record: features depend on it, and a job cannot go on with another
            value.
        argument: more keyword arguments of `add_argument`.
    """
    metadata = {"help": help, "check": check, "recorded": recorded, "argument": argument}
    return field(default=default, metadata=metadata)


def text(default: Any, help: str, *, recorded: bool = True, metavar: str | None = None) -> Any:
    """An option that is any text."""
    return option(default, help, _check_text, recorded=recorded, metavar=metavar)


def flag(help: str, *, recorded: bool = True) -> Any:
    """An option that is off unless it is named."""
    return option(False, help, check_flag, recorded=recorded, action="store_true")


def count(default: int | None, help: str, *, recorded: bool = True) -> Any:
    """An option that is an integer ≥ 1."""
    return option(default, help, check_count, recorded=recorded, type=int, metavar="N")


def choice(default: str | None, choices: tuple[str, ...], help: str) -> Any:
    """An option that is one of several words."""
    return option(default, help, partial(_check_choice, choices), recorded=True, choices=choices)


def duration(help: str) -> Any:
    """An option that is a time, typed with a unit; none by default."""
    check = partial(_check_between, "seconds", _MIN_STEP, _MAX_STEP)
    return option(None, help, check, recorded=True, type=_parse_duration, metavar="TIME")


def rate(help: str) -> Any:
    """An option that is a number per second; none by default."""
    check = partial(_check_between, "a number per second", 1 / _MAX_STEP, 1 / _MIN_STEP)
    return option(None, help, check, recorded=True, type=float, metavar="N")


def time_limit(default: float, help: str) -> Any:
    """An option that is a number of seconds above 0, or none."""
    return option(default, help, check_seconds, recorded=False, type=_parse_time_limit, metavar="S")


def stall(default: float, help: str) -> Any:
    """An option that is a time above 0, typed with a unit, or none."""
    return option(default, help, check_seconds, recorded=False, type=_parse_stall, metavar="TIME")


def actors(help: str) -> Any:
    """An option that is a number of actors, or the minimum and maximum; none by default."""
    return option(None, help, _check_range, recorded=False, type=_parse_range, metavar="N")


def shard_size(help: str) -> Any:
    """An option that is a `ShardSize`; none by default."""
    return option(None, help, _check_range, recorded=True, type=_parse_range, metavar="N")


def part(help: str) -> Any:
    """An option that is one of several parts, counted from 0; none by default."""
    return option(None, help, _check_part, recorded=False, type=_parse_part, metavar="I/N")


def memory(help: str) -> Any:
    """An option that is a number of bytes, typed with a unit; none by default."""
    return option(None, help, check_count, recorded=False, type=_parse_bytes, metavar="SIZE")


def thumbnails(help: str) -> Any:
    """An option that is a side of thumbnails in pixels; none by default."""
    return option(None, help, _check_thumbnails, recorded=True, type=int, metavar="N")


def layers(help: str) -> Any:
    """An option that is one layer or several; none by default."""
    return option(None, help, _check_layers, recorded=True, type=_parse_layers, metavar="N,…")


def size(help: str) -> Any:
    """An option that is a `Size`; none by default."""
    return option(None, help, _check_size, recorded=True, type=_parse_size, metavar="SIZE")


def max_patches(help: str) -> Any:
    """An option that is a `MaxPatches`; `"auto"` by default."""
    return option("auto", help, _check_max_patches, recorded=True, type=_parse_max_patches, metavar="N")


def device(help: str) -> Any:
    """An option that is a device; none by default."""
    return option(None, help, _check_device, recorded=True)


def check_flag(name: str, value: Any) -> None:
    """Raise `ValueError` unless a value is a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_seconds(name: str, value: Any) -> None:
    """Raise `ValueError` unless a value is a time above 0, or `None`."""
    if value is not None and not (is_number(value) and value > 0):
        raise ValueError(f"{name}: expected seconds > 0 or None, got {value!r:.80}")


def _check_range(name: str, value: Any) -> None:
    if not isinstance(value, tuple):
        check_count(name, value)
        return
    for limit in value:
        check_count(name, limit)
    if len(value) != 2 or value[0] > value[1]:
        raise ValueError(f"{name}: expected a minimum and a maximum, as (2, 8), got {value!r:.80}")


def _check_part(name: str, value: Any) -> None:
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(type(number) is int for number in value)
    if not is_pair or not 0 <= value[0] < value[1]:
        raise ValueError(f"{name}: expected a part and their number, from 0/8 to 7/8, got {_slashed(value)}")


def _slashed(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else f"{value!r:.80}"


def _check_between(unit: str, min_: float, max_: float, name: str, value: Any) -> None:
    if not (is_number(value) and min_ <= value <= max_):
        raise ValueError(f"{name}: expected {unit}, {min_:g} to {max_:g}, got {value!r:.80}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r}")


def _check_choice(choices: tuple[str, ...], name: str, value: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_device(name: str, value: Any) -> None:
    _check_text(name, value)
    check_device(name, value)


def _check_layers(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not value or any(type(layer) is not int for layer in value):
        raise ValueError(f"{name}: expected a tuple of one integer or more, got {value!r:.80}")


def _check_max_patches(name: str, value: Any) -> None:
    if value is not None and value != "auto":
        check_count(name, value)


def _check_thumbnails(name: str, value: Any) -> None:
    min_, max_ = THUMBNAIL_SIDES
    if type(value) is not int or not min_ <= value <= max_:
        raise ValueError(f"{name}: expected pixels from {min_} to {max_}, got {value!r:.80}")


def _check_size(name: str, value: Any) -> None:
    check_size(value)


def _parse_amount(text: str, units: Mapping[str, float], expected: str) -> float:
    """A number with one of the `units` behind it."""
    number = text.rstrip(string.ascii_letters)
    try:
        amount = float(number) * units[text.removeprefix(number)]
    except (ValueError, KeyError):
        amount = math.nan
    if not math.isfinite(amount):
        raise ArgumentTypeError(f"expected {expected}, got {text!r}")
    return amount


def _parse_duration(text: str) -> float:
    return _parse_amount(text, _SECONDS, "a time as 2s, 500ms or 1m")


def _parse_bytes(text: str) -> int:
    return int(_parse_amount(text, _BYTES, "bytes as 4GB, 512MiB or 1000000"))


def _parse_time_limit(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected seconds or none, got {text!r}") from None


def _parse_stall(text: str) -> float | None:
    return None if text == "none" else _parse_duration(text)


def _parse_range(text: str) -> int | tuple[int, int]:
    try:
        limits = [int(limit) for limit in text.split("..")]
        if len(limits) > 2:
            raise ValueError
    except ValueError:
        raise ArgumentTypeError(f"expected a number, or two as 2..8, got {text!r:.80}") from None
    return limits[0] if len(limits) == 1 else (limits[0], limits[1])


def _parse_part(text: str) -> tuple[int, int]:
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        raise ArgumentTypeError(f"expected a part and their number, from 0/8 to 7/8, got {text!r:.80}") from None
    return part, parts


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"expected numbers as -4,-1, got {text!r:.80}") from None


def _parse_size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("size: ")) from None


def _parse_max_patches(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, auto or none, got {text!r}") from None

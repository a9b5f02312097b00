"""The options of a job. Each one's name, default, help and check are here alone.

The arguments of `nopad embed`, the check of `nopad.embed` and the record of a job are made from the fields of
`Settings`. Nothing heavy is imported here, so that the command line can read it before its first line of output.
"""

from __future__ import annotations

import math
import string
from argparse import ArgumentTypeError, BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from nopad.counts import check_count
from nopad.environment import check_device
from nopad.preprocessing.limits import INPUT_TIMEOUT_SECONDS, MAX_PATCHES, MAX_PIXELS, NUM_FRAMES, MaxPatches
from nopad.preprocessing.rules import Size, check_size, parse_size

if TYPE_CHECKING:
    from nopad.pipeline.selection import Selection

SHARD_SIZE, SHARD_SIZE_WITH_TOKENS = 2048, 512


def _option(default: Any, help: str, check: Any, *, recorded: bool, **argument: Any) -> Any:
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


def _text(default: Any, help: str, *, recorded: bool = True, metavar: str | None = None) -> Any:
    return _option(default, help, _check_text, recorded=recorded, metavar=metavar)


def _flag(help: str, *, recorded: bool = True) -> Any:
    return _option(False, help, _check_flag, recorded=recorded, action="store_true")


def _count(default: int | None, help: str, *, recorded: bool = True) -> Any:
    return _option(default, help, check_count, recorded=recorded, type=int, metavar="N")


def _choice(default: str | None, choices: tuple[str, ...], help: str) -> Any:
    return _option(default, help, partial(_check_choice, choices), recorded=True, choices=choices)


_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def _seconds(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected seconds or none, got {text!r}") from None


def _duration(text: str) -> float:
    number = text.rstrip(string.ascii_letters)
    try:
        return float(number) * {"": 1, "s": 1, "ms": 1e-3, "m": 60, "h": 3600}[text.removeprefix(number)]
    except (ValueError, KeyError):
        raise ArgumentTypeError(f"expected a time as 2s, 500ms or 1m, got {text!r}") from None


def _bytes(text: str) -> int:
    number = text.rstrip(string.ascii_letters)
    try:
        return int(float(number) * _UNITS[text.removeprefix(number)])
    except (ValueError, KeyError, OverflowError):
        raise ArgumentTypeError(f"expected bytes as 4GB, 512MiB or 1000000, got {text!r}") from None


def _check_seconds(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected seconds > 0 or None, got {value!r}")


def _check_rate(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number per second > 0, got {value!r}")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {value!r}")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def _check_max_patches(name: str, value: Any) -> None:
    if value is not None and value != "auto":
        check_count(name, value)


def _parse_max_patches(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, auto or none, got {text!r}") from None


def _check_layers(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not value or any(type(layer) is not int for layer in value):
        raise ValueError(f"{name}: expected a tuple of one integer or more, got {value!r:.80}")


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"expected numbers as -4,-1, got {text!r:.80}") from None


def _check_size(name: str, value: Any) -> None:
    check_size(value)


def _parse_size(text: str) -> Size:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("size: ")) from None


def _check_choice(choices: tuple[str, ...], name: str, value: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_device(name: str, value: Any) -> None:
    _check_text(name, value)
    check_device(name, value)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a job beside its sources and its folder.

    Raises:
        ValueError: an option of another type or out of its range.
    """

    model: str = _text(MISSING, "Hub name, folder, weights file, or untrained:<published name>")
    revision: str | None = _text(None, "branch, tag or commit on the Hub")
    tokens: bool = _flag("store each picture's tokens, too, in float16")
    layers: tuple[int, ...] | None = _option(
        None,
        "whose tokens are stored, and of which --pool makes embeddings, as -4,-1: from 0, or from the end (default: "
        "the last one)",
        _check_layers,
        recorded=True,
        type=_parse_layers,
        metavar="N,…",
    )
    pool: str = _choice(
        "model",
        ("model", "cls", "mean", "cls+mean"),
        "what an embedding is: the model's own vector, the CLS token, the mean of the patches, or both of these",
    )
    tokens_pool: int = _count(1, "store the mean of each square of N × N tokens")
    size: Size | None = _option(  # noqa: RUF009 - a field
        None,
        "of pictures: model (its own rule, the default), native (as they are), pixels of the short side with the "
        "aspect ratio kept, or HEIGHTxWIDTH",
        _check_size,
        recorded=True,
        type=_parse_size,
        metavar="SIZE",
    )
    min_patches: int | None = _count(
        None, "least patches of a picture, which is scaled up in its aspect ratio; for --size native or pixels"
    )
    multiple_of: int | None = _count(None, "rows and columns of patches are multiples of this")
    max_patches: MaxPatches = _option(  # noqa: RUF009 - a field
        "auto",
        "most patches of a picture, aspect ratio kept; not for pictures of one fixed size; none is no limit but the "
        f"model's own, auto is {MAX_PATCHES} where it has none",
        _check_max_patches,
        recorded=True,
        type=_parse_max_patches,
        metavar="N",
    )
    device: str | None = _option(
        None, "cpu, cuda, cuda:1, …; cuda where there is one, unless given", _check_device, recorded=True
    )
    dtype: str = _choice(
        "auto",
        ("auto", "float32", "bfloat16", "float16"),
        "of the model; auto is bfloat16 on a GPU that has it, else float32, and as it is where weights are quantised",
    )
    compile: bool | None = _option(
        None,
        "compile the model for full packs (default: on a GPU)",
        _check_flag,
        recorded=True,
        action=BooleanOptionalAction,
    )
    precision: str | None = _choice(None, ("fp8",), "of the layers' weights and GEMMs: fp8 for GPUs that have it")
    attention: str = _text("auto", "kernel of the attention")
    workers: int | None = _count(None, "threads that decode (default: one per core)", recorded=False)
    capacity: int | None = _count(None, "tokens per pack (default: by the device, 16896 on an H100, 2048 on a CPU)")
    resize: str = _choice("torch", ("torch", "pil"), "torch is fast, pil bit-exact with transformers' processors")
    frames: int = _count(NUM_FRAMES, "frames of a video, spread evenly over it")
    fps: float | None = _option(
        None,
        "rows of a video for each second, each of one frame; a video is one row unless given",
        _check_rate,
        recorded=True,
        type=float,
        metavar="N",
    )
    every: float | None = _option(
        None,
        "seconds of a video for each row, as 2s, 500ms or 1m, with --frames frames of them",
        _check_seconds,
        recorded=True,
        type=_duration,
        metavar="TIME",
    )
    max_pixels: int = _count(MAX_PIXELS, "pictures of more pixels are failures")
    input_timeout: float | None = _option(
        INPUT_TIMEOUT_SECONDS,
        "seconds that decoding one input may take, none for no limit",
        _check_seconds,
        recorded=False,
        type=_seconds,
        metavar="S",
    )
    decode_memory: int | None = _option(
        None,
        "memory for pictures that are decoded and read ahead, as 4GB or in bytes (default: half of what is free)",
        check_count,
        recorded=False,
        type=_bytes,
        metavar="SIZE",
    )
    image_column: str | None = _text(
        None,
        "column of image bytes in Parquet files and datasets, where it is not clear",
        recorded=False,  # the list of inputs holds it
        metavar="NAME",
    )
    id_column: str | None = _text(
        None,
        "column of names for the rows of Parquet files and datasets (default: their numbers)",
        recorded=False,  # the list of inputs holds it
        metavar="NAME",
    )
    keep: str | None = _text(
        None,
        "columns of Parquet files and datasets, fields of WebDataset samples' JSON, to keep: label,caption or all",
        metavar="NAMES",
    )
    hidden: bool = _flag(
        "take what is hidden or left by systems, too (._*, .thumbnails, @eaDir, …)",
        recorded=False,  # the list of inputs holds it
    )
    allow_outside_paths: bool = _flag(
        "read files that a table names by path wherever they are, not below its folder alone", recorded=False
    )
    embedding_dtype: str = _choice("float32", ("float32", "float16"), "of the embedding in the table")
    embedding_list: str = _choice(
        "fixed",
        ("fixed", "variable"),
        "fixed-size lists, or variable ones for databases that cannot read those",
    )
    shard_size: int | None = _count(
        None, f"rows of a shard (default: {SHARD_SIZE}, with tokens {SHARD_SIZE_WITH_TOKENS})"
    )
    update: bool = _flag(
        "take into a finished table what is new in the sources, and mark what is gone or has changed", recorded=False
    )
    content_hash: bool = _flag(
        "read every input once more, so that --update recognises it by its contents, not by size and time",
        recorded=False,
    )
    retry_failed: bool = _flag("try failed rows of finished shards again", recorded=False)
    actors: int | None = _count(None, "run on Ray with N actors", recorded=False)

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                option.metadata["check"](option.name, value)
        if self.fps is not None and self.every is not None:
            raise ValueError(f"fps, every: expected one of them, got {self.fps} and {self.every}")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Settings:
        """The options among the arguments of a function."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    @property
    def selection(self) -> Selection:
        """The features that the job keeps."""
        from nopad.pipeline.selection import Selection  # imports torch

        names = ("tokens", "layers", "pool", "tokens_pool")
        return Selection(**{name: getattr(self, name) for name in names})

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last."""
        return self.shard_size or (SHARD_SIZE_WITH_TOKENS if self.tokens else SHARD_SIZE)

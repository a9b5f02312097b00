"""One sample of a dataset: its image, and what goes beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from nopad.pipeline.pack_processor import PackProcessor


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A sample as it is planned, before its pixels are read.

    Attributes:
        number: its index in a map-style dataset, its place in an iterable one.
        frames: frames of a clip, 1 for an image.
        frame_patches: patches of a frame, before any are dropped.
        rows: rows in a pack: patches that are not dropped, and prefix tokens.
        segments: how many attend to themselves.
        cost: cost of a forward and a backward.
        item: the item of an iterable dataset; one of a map-style dataset is read where its pixels are.
    """

    number: int
    frames: int
    frame_patches: int
    rows: int
    segments: int
    cost: float
    item: Any = None


def split_item(item: Any, image: str) -> tuple[Any, Any]:
    """The image of an item, and the rest.

    Args:
        item: a mapping with the key `image`, a tuple whose first element is the image, or the image itself.
        image: the key.

    Returns:
        The image as `PackProcessor` takes one, and the rest: a mapping without `image`, the second element of a pair,
        a tuple of all but the first element, or `None`.

    Raises:
        ValueError: a mapping without the key.
    """
    if isinstance(item, Mapping):
        if image not in item:
            keys = sorted(map(str, item))
            raise ValueError(f"image: expected a key of the dataset's items, one of {keys}, got {image!r}")
        return _source(item[image]), {key: value for key, value in item.items() if key != image}
    if isinstance(item, tuple) and item:
        first, *rest = item
        return _source(first), rest[0] if len(rest) == 1 else tuple(rest) or None
    return _source(item), None


def _source(value: Any) -> Any:
    """An image that is stored as `{"bytes": …, "path": …}`, as `datasets` returns one that is not decoded."""
    if isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        return value.get("path") if value.get("bytes") is None else value["bytes"]
    return value


def segment_lengths(processor: PackProcessor, frames: int, frame_patches: int) -> list[int]:
    """Rows of each segment of an image or clip."""
    prefix = processor.num_prefix_tokens
    if processor.frames_attend_jointly:
        return [frames * frame_patches + prefix]
    return [frame_patches + prefix] * frames


def collate_targets(targets: list[Any]) -> Any:
    """Targets beside the images of a pack, by torch's `default_collate`: numbers and tensors stacked, texts listed.

    Raises:
        ValueError: targets of different structures or lengths.
    """
    if all(target is None for target in targets):
        return None
    try:
        return default_collate(targets)
    except (RuntimeError, TypeError, KeyError) as error:
        shown = ", ".join(dict.fromkeys(_describe(target) for target in targets))
        raise ValueError(
            f"targets: expected those of all images of a pack alike, got {shown:.300}; pad them in the dataset, or "
            f"take collate=list"
        ) from error


def _describe(target: Any) -> str:
    """The structure of a target, for messages."""
    if isinstance(target, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(value)}" for key, value in target.items()) + "}"
    if isinstance(target, Tensor | np.ndarray):
        return f"{type(target).__name__}{tuple(target.shape)}"
    if isinstance(target, list | tuple):
        return f"{type(target).__name__} of {len(target)}"
    return type(target).__name__


def seed_of(seed: int, epoch: int, number: int) -> int:
    """A seed of 63 bits for one sample in one epoch."""
    return random.Random(f"{seed} {epoch} {number}").getrandbits(63)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of Python, numpy and torch on the CPU that depend on the seed alone; their states come back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

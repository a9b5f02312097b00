"""The record of a job: everything that its features depend on, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nopad import __version__
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.names import as_text
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import TablePath, read_json
from nopad.environment import dtype_name
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.size import Size
from nopad.storage.errors import UnreachableStoreError

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder
    from nopad.pipeline.worker import Worker

_FOLLOWS = {
    "weights": {"dtype"},
    "preprocessing": {"resize", "size", "min_patches", "max_patches", "multiple_of"},
}
"""Entries of a record that follow from options of the job."""

_SEPARATORS = {"layers": ",", "shard_size": ".."}
"""Of the numbers of an option, as it is typed."""


def record_of(settings: Settings, worker: Worker, weights: str) -> dict[str, str]:
    """Everything that a job's features depend on, in words, as it stands in the metadata of every shard; all but
    `sources` and `inputs`.

    Args:
        weights: their `weights_digest`.
    """
    encoder, rule = worker.encoder, worker.image_processor.rule
    resolved = replace(
        settings,
        device=encoder.device.type,
        dtype=dtype_name(encoder.dtype),
        compile=encoder.compiled_capacity is not None,
        precision=encoder.precision,
        attention=encoder.attention_backend,
        capacity=worker.capacity,
        decode=worker.decode,
        size=_size_of(rule, encoder),
        min_patches=rule.min_patches,
        max_patches=rule.max_patches,
        multiple_of=rule.multiple_of,
        layers=None if settings.layers is None else encoder.layer_indices(settings.layers),
    )
    options = {
        option.name: _in_words(getattr(resolved, option.name), _SEPARATORS.get(option.name, "x"))
        for option in fields(resolved)
        if option.metadata["recorded"]
    }
    return {
        "version": __version__,
        **options,
        "family": encoder.family,
        "architecture": json.dumps(architecture(encoder), sort_keys=True),
        "weights": weights,
        "threads": str(torch.get_num_threads()) if encoder.device.type == "cpu" else "",
        "execution": encoder.execution,
        "max_segments": str(encoder.compiled_max_segments or ""),
        "preprocessing": worker.preprocessing,
        "embedding": worker.selection.describe(encoder),
    }


def _size_of(rule: Preprocessing, encoder: PackedEncoder) -> Size | None:
    """The size that a rule makes, however it was given; `None` where no size makes this of the checkpoint's rule."""
    size: Size = "model"
    if rule.rule == "native":
        size = "native"
    elif rule.rule in ("shortest_edge", "height_width") and rule.size:
        size = rule.size
    of_checkpoint = encoder.model_preprocessing.with_size(size)
    return size if _without_limits(rule) == _without_limits(of_checkpoint) else None


def _without_limits(rule: Preprocessing) -> Preprocessing:
    return replace(rule, min_patches=None, max_patches=None, multiple_of=1)


def _in_words(value: str | int | bool | tuple[int, ...] | None, separator: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return separator.join(map(str, value))
    return "" if value is None else as_text(str(value))


def fingerprint(record: Mapping[str, str]) -> str:
    """A short name for a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def jobs_in(folder: TablePath) -> dict[str, JobFolder]:
    """The files of each job of a table, by the fingerprint in its shards' names; damaged jobs are left out."""
    jobs = {}
    for each in JobFolder(folder).all():
        try:
            jobs[fingerprint(read_json(each.metadata / "job.json"))] = each
        except UnreachableStoreError:
            raise
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return jobs


def architecture(encoder: PackedEncoder) -> dict[str, Any]:
    """The config that features depend on beside the weights: heads, epsilons, patch order and the like."""
    config = encoder.config.to_diff_dict()
    return {
        key: value for key, value in config.items() if key not in ("transformers_version", "architectures", "dtype")
    }


def weights_digest(encoder: PackedEncoder) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights."""
    return _digest(_weights(encoder))


def begin_weights_digest(encoder: PackedEncoder) -> Future[str]:
    """`weights_digest` in a thread: half a second or more for each gigabyte, while the encoder is compiled."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="nopad-digest")
    digest = pool.submit(_digest, _weights(encoder))
    pool.shutdown(wait=False)
    return digest


def _digest(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights(encoder: PackedEncoder) -> dict[str, Tensor]:
    if encoder.precision is None:
        return encoder.state_dict()
    # What cannot be saved has no state_dict; float8 weights and their scales are buffers.
    return dict(chain(encoder.named_parameters(), encoder.named_buffers()))


def check_same(old: Mapping[str, str], new: Mapping[str, str], folder: TablePath) -> None:
    """Refuse to mix two jobs in one folder; inputs may have changed, and a job keeps to its number of threads.

    Raises:
        ValueError: what differs.
    """
    keys = [
        key for key in {**old, **new} if key not in ("inputs", "threads") and not _is_same(old.get(key), new.get(key))
    ]
    # What follows from an option that differs is not listed beside it.
    for key, options in _FOLLOWS.items():
        if options & {*keys}:
            keys = [other for other in keys if other != key]
    if keys:
        lines = [line for key in keys for line in _difference(key, old.get(key, "unset"), new.get(key, "unset"))]
        raise ValueError(
            f"{folder} holds a job with other settings:\n" + "\n".join(lines) + "\n"
            "use the settings that it was begun with, or another folder"
        )


def _is_same(old: str | None, new: str | None) -> bool:
    """Whether an option has one value; a record of before there was the option does as if it is off."""
    return old == new or (old is None and new in ("", "no", "cpu"))


def _difference(key: str, old: str, new: str) -> list[str]:
    before, now = (_object(text) for text in (old, new))
    if key == "architecture" and before and now:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [f"  {key}: {name} {before.get(name)} there, {now.get(name)} now" for name in names]
    return [f"  {key}: {old or 'none'} there, {new or 'none'} now"]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

"""What decides the features of a job: its settings, their fingerprint, and the files that keep them."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nopad import __version__
from nopad.atomic import atomic_write
from nopad.checkpoints.untrained import UNTRAINED
from nopad.embedding.inputs.archives import why
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import InputList, as_text
from nopad.embedding.table.writer import OWN_FOLDER, ShardFormat, folder_error
from nopad.encoder import PackedEncoder
from nopad.environment import dtype_name
from nopad.loading import load
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import MAX_PIXELS
from nopad.preprocessing.transforms import Resize

DTYPES = ("float32", "bfloat16", "float16")
SHARD_SIZE, SHARD_SIZE_WITH_TOKENS = 2048, 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a job; see `nopad.embedding.job.embed` for their meaning.

    Raises:
        ValueError: a number below 1, or an unknown device or dtype.
    """

    model: str
    revision: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    attention: str = "auto"
    tokens: bool = False
    max_patches: int | None = None
    resize: Resize = "torch"
    capacity: int | None = None
    frames: int = 8
    max_pixels: int = MAX_PIXELS
    embedding_dtype: str = "float32"
    embedding_list: str = "fixed"
    shard_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("shard_size", "capacity", "max_patches", "frames", "max_pixels"):
            check_count(name, getattr(self, name))
        if not isinstance(self.tokens, bool):
            raise ValueError(f"tokens: expected True or False, got {self.tokens!r}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: got {self.device!r}: {error}") from error
        if device.type == "meta":
            raise ValueError(f"device: expected one with values, such as cpu or cuda, got {self.device!r}")
        # What these refuse is told before anything is loaded or begun.
        ShardFormat(dimension=1, embedding_dtype=self.embedding_dtype, embedding_list=self.embedding_list)
        Reader(frames=self.frames, max_pixels=self.max_pixels)

    @property
    def rows_per_shard(self) -> int:
        """Rows of every shard but the last."""
        return self.shard_size or (SHARD_SIZE_WITH_TOKENS if self.tokens else SHARD_SIZE)

    def load(self) -> PackedEncoder:
        """The encoder, on its device."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        options: dict[str, Any] = {"device": self.device, "dtype": dtype, "attention": self.attention}
        return load(self.model, revision=self.revision, **options)

    def worker(self, encoder: PackedEncoder, threads: int | None = None) -> Worker:
        """A worker that embeds by these settings."""
        options: dict[str, Any] = {"resize": self.resize, "max_patches": self.max_patches, "tokens": self.tokens}
        return Worker(encoder, capacity=self.capacity, threads=threads, **options)

    def format(self, encoder: PackedEncoder) -> ShardFormat:
        """The columns of the table."""
        return ShardFormat(
            dimension=encoder.embedding_size,
            embedding_dtype=self.embedding_dtype,
            embedding_list=self.embedding_list,
            token_dimension=encoder.hidden_size if self.tokens else None,
        )


def check_count(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is an integer ≥ 1, or `None`, where nothing was given."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}: expected an integer ≥ 1, got {value!r}")


def record_of(settings: Settings, encoder: PackedEncoder, sources: list[str], inputs: InputList) -> dict[str, str]:
    """Everything that decides a job's features, in words, as it stands in the metadata of every shard."""
    worker = settings.worker(encoder, threads=1)
    return {
        "version": __version__,
        "model": as_text(settings.model),
        "revision": settings.revision or "",
        "family": encoder.family,
        "architecture": json.dumps(architecture(encoder), sort_keys=True),
        "weights": weights_digest(encoder),
        "dtype": dtype_name(encoder.dtype),
        "device": encoder.device.type,
        "attention": encoder.attention,
        "layers": " ".join(filter(None, (encoder.execution, str(encoder.compiled_capacity or ""), encoder.precision))),
        "preprocessing": worker.preprocessing,
        "capacity": str(worker.capacity),
        "max_pixels": str(settings.max_pixels),
        "frames": str(settings.frames),
        "embedding": "pooled" if encoder.projection_dim is None else "image_embeds",
        "embedding_dtype": settings.embedding_dtype,
        "embedding_list": settings.embedding_list,
        "tokens": "yes" if settings.tokens else "no",
        "rows_per_shard": str(settings.rows_per_shard),
        "sources": json.dumps(sources),
        "inputs": inputs.digest(),
    }


def fingerprint(record: Mapping[str, str]) -> str:
    """A short name for a record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:12]


def architecture(encoder: PackedEncoder) -> dict[str, Any]:
    """What its config says beside the weights: heads, epsilons, patch order and the like."""
    config = encoder.config.to_diff_dict()
    return {
        key: value for key, value in config.items() if key not in ("transformers_version", "architectures", "dtype")
    }


def weights_digest(encoder: PackedEncoder) -> str:
    """SHA-256 over names, dtypes, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(encoder).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(encoder: PackedEncoder) -> dict[str, Any]:
    if encoder.precision is None:
        return encoder.state_dict()
    # What cannot be saved has no state_dict; float8 weights and their scales are buffers.
    return dict(chain(encoder.named_parameters(), encoder.named_buffers()))


def check_same(old: Mapping[str, str], new: Mapping[str, str], folder: Path) -> None:
    """Refuse to mix two jobs in one folder.

    Raises:
        ValueError: what differs.
    """
    keys = [key for key in {**old, **new} if key != "inputs" and old.get(key) != new.get(key)]
    if "dtype" in keys:  # the hash of the same weights differs with it
        keys = [key for key in keys if key != "weights"]
    if keys:
        lines = [line for key in keys for line in _difference(key, old.get(key, "unset"), new.get(key, "unset"))]
        raise ValueError(
            f"{folder} holds a job with other settings:\n" + "\n".join(lines) + "\n"
            "use the settings that it was begun with, or another folder"
        )


def _same_path(old: str, new: str) -> bool:
    """Whether two names are one local path but for a slash at the end, `.` and `..`."""
    if new.startswith(UNTRAINED) or not (os.path.exists(old) and os.path.exists(new)):  # a glob, or a name on the Hub
        return False
    # Behind a link `..` leads elsewhere than in the name.
    return os.path.normpath(old) == os.path.normpath(new) and os.path.samefile(old, new)


def _difference(key: str, old: str, new: str) -> list[str]:
    if key == "architecture" and old.startswith("{") and new.startswith("{"):
        before, now = json.loads(old), json.loads(new)
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        return [f"  {key}: {name} {before.get(name)} there, {now.get(name)} now" for name in names]
    return [f"  {key}: {old} there, {new} now"]


class JobFolder:
    """The files of a job: shards in the folder itself, all else in its `.nopad`."""

    def __init__(self, folder: str | Path) -> None:
        if not os.fspath(folder):
            raise ValueError("out: expected a folder, got ''; '.' is the current one")
        self.folder = Path(folder)
        self.own = self.folder / OWN_FOLDER

    @property
    def has_job(self) -> bool:
        """Whether a job was begun here."""
        return (self.own / "job.json").exists()

    def spelling(self, model: str, sources: Sequence[str]) -> tuple[str, list[str]]:
        """Model and sources as the job that was begun here spells them, where they are the same paths."""
        try:
            record = json.loads((self.own / "job.json").read_text(encoding="utf-8"))
            there = [record["model"], *json.loads(record["sources"])]
        except (OSError, ValueError, LookupError, TypeError):  # no job yet, or one that `read` refuses
            return model, list(sources)
        here = [model, *sources]
        if len(here) == len(there):
            here = [old if _same_path(old, new) else new for old, new in zip(there, here, strict=True)]
        return here[0], here[1:]

    def begin(self, record: Mapping[str, str], inputs: InputList) -> None:
        """Keep a new job's list and record; it is begun once both are there."""
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        try:
            inputs.save(self.own / "inputs.parquet")
            with atomic_write(self.own / "job.json") as file:
                file.write(text.encode())
        except OSError as error:
            raise folder_error(error, self.folder) from error

    def read(self) -> tuple[dict[str, str], InputList]:
        """The record and the list of the job that was begun here.

        Raises:
            ValueError: one of them is damaged.
        """
        advice = "remove job.json there and run the job again (shards that fit are kept), or use another folder"
        try:
            record = json.loads((self.own / "job.json").read_text(encoding="utf-8"))
            inputs = InputList.load(self.own / "inputs.parquet")
            is_whole = record["inputs"] == inputs.digest()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.own}: the job's files cannot be read ({why(error)}); {advice}") from error
        if not is_whole:
            raise ValueError(f"{self.own}: inputs.parquet is not the list that job.json was begun with; {advice}")
        return record, inputs

    def temporary(self, shard: Path) -> Path:
        """Where a shard is written before it is whole, another file each time: two actors may be at the same shard."""
        return self.own / f"{shard.name}.{uuid.uuid4().hex}.part"

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.own.glob("*.part"):
            path.unlink(missing_ok=True)

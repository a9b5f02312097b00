"""The settings of a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.table.writer import ShardFormat
from nopad.encoder import PackedEncoder
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

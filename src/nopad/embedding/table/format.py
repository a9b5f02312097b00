"""The format of a shard: its columns, its metadata, and what a row of it has to hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

PREFIX = "nopad."
FORMAT = "1"
TEXTS = ("id", "source", "status", "error")
NUMBERS = ("width", "height", "grid_t", "grid_h", "grid_w")
COLUMNS = (*TEXTS, *NUMBERS, "embedding")
TOKENS = "tokens"
OK, FAILED, GONE, CHANGED = "ok", "failed", "gone", "changed"
STATUSES = (OK, FAILED, GONE, CHANGED)
"""Status of a row: with features; without, for the reason in `error`; or marked by an update, its input gone from the
sources, or changed and now in another row."""
DTYPES, LISTS = ("float32", "float16"), ("fixed", "variable")
KEPT = "kept"
_FORMAT_KEYS = ("format", "embedding.width", "tokens.dtype", "tokens.width", "tokens.layers", "tokens.pool", KEPT)
MAX_TOKEN_BYTES = 2**31 - 1
"""Bytes of a row's tokens: Parquet counts them in an int32."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one input: its features, or the reason why there are none.

    `width` and `height` are the pixels of the upright image, `grid` its `(t, h, w)` patches; `embedding` is `(D,)`,
    `tokens` is `(t * h * w, D)` float16. An ok row has all of them (tokens where the format stores them), a failed row
    no features. `kept` has the values of the format's further columns, as Python's or Arrow's, or is empty for null.
    """

    id: str
    source: str
    status: str = "ok"
    error: str | None = None
    width: int | None = None
    height: int | None = None
    grid: tuple[int, int, int] | None = None
    embedding: np.ndarray | None = None
    tokens: np.ndarray | None = None
    kept: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ShardFormat:
    """Columns of a shard and their types.

    Args:
        dimension: length of an embedding.
        embedding_dtype: "float32" or "float16".
        embedding_list: "fixed" for a FixedSizeList, "variable" for a plain list: some databases cannot read the fixed.
        token_dimension: the hidden size where tokens are stored, else None.
        token_layers: the layers of which tokens are stored; None for those of the model alone, without an axis of
            layers.
        tokens_pool: side of the squares of tokens of which the mean is stored.
        kept: further columns, of other names than those of the table.
    """

    dimension: int
    embedding_dtype: str = "float32"
    embedding_list: str = "fixed"
    token_dimension: int | None = None
    token_layers: tuple[int, ...] | None = None
    tokens_pool: int = 1
    kept: pa.Schema | None = None

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension {self.dimension}, expected at least 1")
        if self.embedding_dtype not in DTYPES:
            raise ValueError(f"embedding_dtype {self.embedding_dtype!r}, expected 'float32' or 'float16'")
        if self.embedding_list not in LISTS:
            raise ValueError(f"embedding_list {self.embedding_list!r}, expected 'fixed' or 'variable'")
        if self.token_dimension is not None and self.token_dimension < 1:
            raise ValueError(f"token_dimension {self.token_dimension}, expected at least 1, or None for no tokens")
        if taken := {*self.kept_names} & {*COLUMNS, TOKENS}:
            raise ValueError(f"kept: the table has columns {', '.join(sorted(taken))} of its own")

    @property
    def kept_names(self) -> list[str]:
        """Names of the further columns."""
        return [] if self.kept is None else self.kept.names

    def schema(self, metadata: Mapping[str, str]) -> pa.Schema:
        """The columns, and `metadata` with the format's own keys, under the prefix `nopad.` and in sorted order."""
        format_metadata = {"format": FORMAT, "embedding.width": str(self.dimension)}
        if self.token_dimension is not None:
            format_metadata |= {"tokens.dtype": "float16", "tokens.width": str(self.token_dimension)}
            if self.token_layers is not None:
                format_metadata["tokens.layers"] = ",".join(map(str, self.token_layers))
            if self.tokens_pool > 1:
                format_metadata["tokens.pool"] = str(self.tokens_pool)
        job_metadata = {key: value for key, value in metadata.items() if key not in _FORMAT_KEYS}
        fields = [pa.field(name, pa.string()) for name in TEXTS]
        fields += [pa.field(name, pa.int32()) for name in NUMBERS]
        fields += [pa.field("embedding", self.embedding_type())]
        if self.token_dimension is not None:
            fields += [pa.field(TOKENS, pa.large_binary())]
        if self.kept is not None:
            fields += list(self.kept)
            format_metadata |= {KEPT: json.dumps(self.kept_names)}
        all_metadata = sorted((job_metadata | format_metadata).items())
        return pa.schema(fields, {PREFIX + key: value for key, value in all_metadata})

    def embedding_type(self) -> pa.DataType:
        """Arrow's type of an embedding."""
        value = pa.from_numpy_dtype(np.dtype(self.embedding_dtype))
        return pa.list_(value, self.dimension) if self.embedding_list == "fixed" else pa.list_(value)


def token_shape(grid: tuple[int, int, int], layers: tuple[int, ...] | None = None, pool: int = 1) -> tuple[int, ...]:
    """The shape of a row's stored tokens without their width: `(t, h, w)`, with an axis of layers where there is one.

    Args:
        grid: of the patches.
        layers, pool: as `ShardFormat` has them.
    """
    t, h, w = grid
    shape = t, -(-h // pool), -(-w // pool)
    return shape if layers is None else (len(layers), *shape)


def check_row(row: Row, format: ShardFormat) -> None:
    """Check that a row is one of a format.

    Raises:
        ValueError: an unknown status, features that an ok row lacks or another has, or arrays that do not fit.
    """
    if row.status not in STATUSES:
        raise ValueError(f"row {row.id!r}: status {row.status!r}, expected one of {', '.join(STATUSES)}")
    if row.status != OK:
        if row.embedding is not None or row.tokens is not None:
            raise ValueError(f"row {row.id!r}: features on a {row.status} row, expected none")
        return
    for name in ("width", "height", "grid", "embedding"):
        if getattr(row, name) is None:
            raise ValueError(f"row {row.id!r}: {name} missing on an ok row")
    _check_array(row, "embedding", row.embedding, format.embedding_dtype, (format.dimension,))
    if format.token_dimension is None:
        if row.tokens is not None:
            raise ValueError(f"row {row.id!r}: tokens for a format without token_dimension")
        return
    if row.tokens is None:
        raise ValueError(f"row {row.id!r}: tokens missing on an ok row, expected for token_dimension")
    assert row.grid is not None
    t, h, w = row.grid
    number = math.prod(token_shape((t, h, w), format.token_layers, format.tokens_pool))
    _check_array(row, "tokens", row.tokens, "float16", (number, format.token_dimension))
    if row.tokens.nbytes > MAX_TOKEN_BYTES:
        raise ValueError(f"row {row.id!r}: tokens of {row.tokens.nbytes} bytes, Parquet takes {MAX_TOKEN_BYTES}")


def _check_array(row: Row, name: str, array: np.ndarray | None, dtype: str, shape: tuple[int, ...]) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"row {row.id!r}: {name} is {type(array).__name__}, expected a NumPy array")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise ValueError(f"row {row.id!r}: {name} is {array.dtype} {array.shape}, expected {dtype} {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"row {row.id!r}: {name} has strides {array.strides}, expected a contiguous array")

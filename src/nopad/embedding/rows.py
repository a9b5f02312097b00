"""From the results of the pipeline to the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nopad.embedding.inputs.listing import Input
from nopad.embedding.table.format import MAX_TOKEN_BYTES, Row
from nopad.pipeline.pack_runner import EmbeddingResult
from nopad.preprocessing.decode import ImageError, RefusedError, UnreachableError
from nopad.storage.addresses import WEB, scheme_of
from nopad.storage.errors import UnusableStoreError


def table_rows(
    inputs: Sequence[Input],
    results: Sequence[EmbeddingResult],
    embedding_dtype: str,
    kept: Sequence[tuple[Any, ...]],
) -> list[Row]:
    """The rows of a table for inputs, their results, and what is kept of their own columns.

    What a table cannot hold becomes a failed row.
    """
    dtype = np.dtype(embedding_dtype)
    every = zip(inputs, results, kept, strict=True)
    return [_row(item, result, dtype, values) for item, result, values in every]


class Reached:
    """Whether the inputs of a shard could be reached, by their results as they come: a row of one that could not would
    say nothing about it.

    Attributes:
        number, num_failed: of results.
    """

    def __init__(self) -> None:
        self.number = self.num_failed = 0
        self._num_refused = 0
        self._refused: UnusableStoreError | None = None  # the first result
        self._unreachable: UnreachableError | None = None

    def add(self, inputs: Sequence[Input], results: Sequence[EmbeddingResult]) -> None:
        """Take note of results."""
        for item, result in zip(inputs, results, strict=True):
            self.number += 1
            error = result.error
            self.num_failed += error is not None
            if not isinstance(error, UnreachableError):
                continue
            name = f"{item.id} of {item.source}"
            self._unreachable = self._unreachable or UnreachableError(name, error.reason)
            if isinstance(error, RefusedError):
                self._num_refused += 1
                if self.number == 1 and scheme_of(item.path) not in WEB:
                    self._refused = UnusableStoreError(f"{name}: {error.reason}")

    def check(self, *, is_whole: bool) -> None:
        """Check that all could.

        Args:
            is_whole: whether they are all inputs of a shard, not a few that failed before.

        Raises:
            UnreachableError: one could not.
            UnusableStoreError: access to all of a shard was refused.
        """
        if self._refused is not None and is_whole and self._num_refused == self.number:
            raise self._refused
        if self._unreachable is not None:
            raise self._unreachable

    def check_listed(self, error: OSError | ImageError | None) -> None:
        """Check that all inputs of a shard could be found.

        Args:
            error: what was raised while they were.

        Raises:
            UnreachableError: they could not.
            UnusableStoreError: access was refused, and no other input is there.
        """
        if error is None:
            return
        if (unusable := _unusable(error)) and self.num_failed == self.number:
            raise unusable
        raise error if isinstance(error, UnreachableError) else UnreachableError("its inputs", str(error)) from error


def _unusable(error: OSError | ImageError) -> UnusableStoreError | None:
    if isinstance(error, RefusedError):
        return UnusableStoreError(str(error))
    return error if isinstance(error, UnusableStoreError) else None


def _row(item: Input, result: EmbeddingResult, dtype: np.dtype, kept: tuple[Any, ...]) -> Row:
    if (reason := _why_failed(result, dtype)) is not None:
        return Row(item.id, item.source, "failed", reason, kept=kept)
    assert result.embedding is not None
    return Row(
        id=item.id,
        source=item.source,
        width=result.width,
        height=result.height,
        grid=result.grid,
        embedding=result.embedding.astype(dtype, copy=False),
        tokens=result.tokens,
        kept=kept,
    )


def _why_failed(result: EmbeddingResult, dtype: np.dtype) -> str | None:
    if result.error is not None or result.embedding is None:
        return "no features" if result.error is None else result.error.reason
    narrows = dtype.itemsize < result.embedding.itemsize
    if narrows and (largest := np.abs(result.embedding).max()) > np.finfo(dtype).max:
        return f"its embedding goes up to {largest:g}, which {dtype} cannot hold; store it as float32"
    if result.tokens is not None and result.tokens.nbytes > MAX_TOKEN_BYTES:
        return f"its tokens are {result.tokens.nbytes} bytes, a table takes {MAX_TOKEN_BYTES}; set max_patches"
    return None

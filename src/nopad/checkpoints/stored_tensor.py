"""Tensors in a file: shape and dtype at once, values when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from nopad.checkpoints.conversions import SAME, Part

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape, dtype: known before a value is read.
        read: returns the values, which may lie in the mapped file.
        copy: reads the whole tensor into memory of its own, `None` where the file offers no more than `read`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    copy: Callable[[], Tensor] | None = None

    def __getitem__(self, index: Any) -> Tensor:
        """A copy of the values, as transformers' loader takes them from a safetensors slice.

        Not the mapped file itself, or saving over it would change the weights in use.
        """
        if self.copy is not None and index is ...:
            return self.copy()
        return self.read()[index].clone()

    def part(self, part: Part) -> StoredTensor:
        """The part of this tensor that one parameter takes."""
        if part.rename.reshape is SAME:
            return self
        parts = part.rename.reshape.parts
        try:
            shape = tuple(parts(torch.empty(self.shape, device="meta"))[part.index].shape)
        except (IndexError, RuntimeError):  # misshapen, as `check_strictly` reports
            shape = self.shape
        return replace(self, shape=shape, read=lambda: parts(self.read())[part.index], copy=None)


def joined(tensors: Sequence[StoredTensor]) -> StoredTensor:
    """Several tensors, whose rows follow each other, as one."""
    first, *others = tensors
    if not others:
        return first
    rows = sum(tensor.shape[0] if tensor.shape else 0 for tensor in tensors)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return StoredTensor((rows, *first.shape[1:]), dtype, lambda: torch.cat([tensor.read() for tensor in tensors]))

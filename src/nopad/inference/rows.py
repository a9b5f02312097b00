"""Rows of a static pack: what is not finite kept apart, what is missing filled up."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.layers.triton_check import has_triton
from nopad.layout import Segments


def finite_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are finite, `(T,)`, and the tokens with zeros in place of the others.

    Kernels that take whole tiles of keys multiply what lies behind a segment by zero, and zero times NaN is NaN: what
    is not finite has to be kept away from them. It comes back, for its own segment alone, once they are through.
    """
    finite = tokens.isfinite().all(dim=1)
    return finite, tokens.masked_fill(~finite[:, None], 0.0)


def fill_up_rows(tokens: Tensor, capacity: int, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens as `finite_rows` leaves them, zeros behind them, and which were finite, `(T,)`.

    Args:
        tokens: `(T, D)`.
        capacity: rows of the result.
        room: `(capacity, D)` to write to, where kernels of ours can.
    """
    if has_triton(tokens.device):
        from nopad.inference import triton_kernels

        return triton_kernels.fill_up(tokens, tokens.new_empty(capacity, tokens.shape[1]) if room is None else room)
    finite, tokens = finite_rows(tokens)
    return F.pad(tokens, (0, 0, 0, capacity - len(tokens))), finite


def spoil(tokens: Tensor, finite: Tensor, segments: Segments) -> Tensor:
    """A copy of the tokens with NaN all over the segments some of whose rows were not `finite`, `(T,)`."""
    if has_triton(tokens.device):
        from nopad.inference import triton_kernels

        return triton_kernels.spoil(tokens, finite, segments.cu_seqlens, segments.max_seqlen)
    spoilt = ~whole_segments(finite, segments)[segments.index()]
    return tokens.masked_fill(spoilt[:, None], float("nan"))


def whole_segments(finite: Tensor, segments: Segments) -> Tensor:
    """Which segments have finite rows alone: `(T,)` to `(S,)`."""
    offsets = segments.cu_seqlens.long()
    return torch.segment_reduce(finite.float(), "min", offsets=offsets, axis=0, unsafe=True) > 0


class FixedRows:
    """Hooks around a module that fill its input up to `capacity` rows and cut its output down again."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.given = threading.local()  # to the call of this thread

    def fill_up(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor] | None:
        """What `register_forward_pre_hook` takes."""
        (patches,) = arguments
        self.given.rows = len(patches)
        if torch.is_grad_enabled() or len(patches) >= self.capacity:
            return None
        return (F.pad(patches, (0, 0, 0, self.capacity - len(patches))),)

    def cut(self, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        """What `register_forward_hook` takes."""
        return output[: self.given.rows]

    def __reduce__(self) -> tuple[type[FixedRows], tuple[int]]:
        return FixedRows, (0,)  # a copy of a compiled encoder is not compiled

"""Rows of a static pack: what is not finite kept apart, what is missing filled up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.segments import Segments


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

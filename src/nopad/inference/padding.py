"""Padding of packs to a fixed shape; non-finite rows are masked before the layers and restored after them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from nopad.kernels.availability import has_triton
from nopad.segments import Segments

MIN_MAX_SEQLEN = 256
"""Smallest `max_seqlen` of a static pack."""
MAX_PADDING_SEQLEN = 512
"""Padding is cut into segments of about this length at most: attention over longer ones would take time."""


def mask_nonfinite_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Replace rows that contain NaN or infinity by zeros.

    Attention kernels that read whole tiles of keys multiply what follows a segment by zero, and zero times NaN is NaN.
    `poison_segments` restores NaN, in the row's own segment only.

    Returns:
        `(T,)` bool, whether a row was finite, and the tokens `(T, D)`.
    """
    finite = tokens.isfinite().all(dim=1)
    return finite, tokens.masked_fill(~finite[:, None], 0.0)


def pad_rows(tokens: Tensor, capacity: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mask rows that are not finite and pad with zeros to `capacity` rows.

    Args:
        tokens: `(T, D)`.
        capacity: rows of the result.
        out: `(capacity, D)` tensor that the Triton kernel may write the result to.

    Returns:
        `(capacity, D)` tokens, and `(T,)` bool, whether a row was finite.
    """
    if has_triton(tokens.device):
        from nopad.kernels import triton_padding

        return triton_padding.pad_rows(tokens, tokens.new_empty(capacity, tokens.shape[1]) if out is None else out)
    finite, tokens = mask_nonfinite_rows(tokens)
    return F.pad(tokens, (0, 0, 0, capacity - len(tokens))), finite


def poison_segments(tokens: Tensor, finite: Tensor, segments: Segments) -> Tensor:
    """A copy of the tokens in which every segment that had a non-finite row is filled with NaN.

    Args:
        tokens: `(T, D)`.
        finite: `(T,)` bool, whether a row was finite before the layers.
        segments: segments of the tokens.
    """
    if has_triton(tokens.device):
        from nopad.kernels import triton_padding

        return triton_padding.poison_segments(tokens, finite, segments.cu_seqlens, segments.max_seqlen)
    poisoned = ~finite_segments(finite, segments)[segments.index()]
    return tokens.masked_fill(poisoned[:, None], float("nan"))


def finite_segments(finite: Tensor, segments: Segments) -> Tensor:
    """Whether all rows of a segment are finite: `(T,)` to `(S,)`."""
    offsets = segments.cu_seqlens.long()
    return torch.segment_reduce(finite.float(), "min", offsets=offsets, axis=0, unsafe=True) > 0


def pad_segments(segments: Segments, capacity: int, max_segments: int | None) -> Segments:
    """Append padding segments up to `capacity` tokens, and round `max_seqlen` up.

    With `max_segments`, all packs of at most that many segments get the same number of segments; with `None`, as few as
    possible. Windows are padded alike.
    """
    if max_segments is None:
        num_segments = len(segments) + (capacity - segments.num_tokens) // MAX_PADDING_SEQLEN + 1
    else:
        num_segments = max_segments + capacity // MAX_PADDING_SEQLEN + 1
    padded = segments.padded(capacity, num_segments)
    windows = None if segments.windows is None else segments.windows.padded_to(capacity, max_segments)
    max_seqlen = round_up_max_seqlen(padded.max_seqlen, capacity)
    return dataclasses.replace(padded, max_seqlen=max_seqlen, windows=windows)


def round_up_max_seqlen(max_seqlen: int, capacity: int) -> int:
    """`max_seqlen` rounded up to a power of two: few graphs, and the same tiles for most packs."""
    return min(max(MIN_MAX_SEQLEN, 1 << (max_seqlen - 1).bit_length()), capacity)

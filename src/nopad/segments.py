"""Segments of a pack: consecutive tokens that attend to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

MAX_TOKENS = 2**31 - 1
"""Tokens of a pack: attention kernels take offsets in int32."""


@dataclasses.dataclass(frozen=True)
class Segments:
    """Lengths and offsets of the segments of a pack.

    `lengths` stays on the host, so that `cu_seqlens` is never read back from the device.

    Attributes:
        lengths: tokens in each segment, S ints.
        cu_seqlens: `(S + 1,)` int32 offsets on the device of the tokens.
        max_seqlen: tokens in the longest segment, 0 for an empty pack, or any upper bound.
        windows: parts of these segments over the same tokens, for layers that attend within windows; else `None`.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    windows: Windows | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Segments:
        """Segments of the given lengths, with offsets on `device`.

        Raises:
            ValueError: more tokens than an int32 offset counts.
        """
        offsets = [0, *accumulate(lengths)]
        if offsets[-1] > MAX_TOKENS:
            raise ValueError(f"segments: expected at most {MAX_TOKENS} tokens in a pack, got {offsets[-1]}")
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)
        return cls(tuple(lengths), cu_seqlens, max(lengths) if lengths else 0)

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in all segments."""
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_segments(self) -> int:
        """Number of segments."""
        return len(self.lengths)

    def lengthened(self, num_added: int) -> Segments:
        """Each segment with so many more tokens."""
        return Segments.of([length + num_added for length in self.lengths], self.cu_seqlens.device)

    def of_one_token(self) -> Segments:
        """One segment of one token for each of these."""
        return Segments.of([1] * len(self.lengths), self.cu_seqlens.device)

    def padded(self, num_tokens: int, num_segments: int) -> Segments:
        """Append padding segments of nearly equal length, up to `num_tokens` tokens in `num_segments` segments.

        Raises:
            ValueError: more tokens than `num_tokens`, or no room for a padding segment.
        """
        missing_tokens, missing_segments = num_tokens - self.num_tokens, num_segments - len(self)
        if missing_tokens < 0 or missing_segments < 1:
            raise ValueError(
                f"expected at most {num_tokens} tokens in fewer than {num_segments} segments, "
                f"got {self.num_tokens} in {len(self)}"
            )
        length, longer = divmod(missing_tokens, missing_segments)
        padding = [length + 1] * longer + [length] * (missing_segments - longer)
        return Segments.of([*self.lengths, *padding], self.cu_seqlens.device)

    def to(self, device: torch.device | str | int) -> Segments:
        """The same segments with offsets on `device`, copied there once; accelerate calls it for layers elsewhere."""
        device = torch.device(device)
        if device == self.cu_seqlens.device:
            return self
        copies = self.__dict__.setdefault("_copies", {})
        if device not in copies:
            windows = None if self.windows is None else self.windows.to(device)
            copies[device] = dataclasses.replace(self, cu_seqlens=self.cu_seqlens.to(device), windows=windows)
        return copies[device]

    def first(self) -> Segments:
        """The first segment alone."""
        first = Segments.of(self.lengths[:1], self.cu_seqlens.device)
        if self.windows is None:
            return first
        number = list(accumulate(self.windows.lengths)).index(self.lengths[0]) + 1
        return dataclasses.replace(first, windows=self.windows.with_lengths(self.windows.lengths[:number]))

    def index(self) -> Tensor:
        """Index of each token's segment, `(T,)` int64 on the device; no host read."""
        lengths = self.cu_seqlens.diff().long()
        indices = torch.arange(len(self), device=lengths.device)
        return indices.repeat_interleave(lengths, output_size=self.num_tokens)


@dataclasses.dataclass(frozen=True)
class Windows(Segments):
    """Windows of a pack's segments.

    Attributes:
        max_seqlen: tokens in a whole window; those at the edges of an image have fewer.
        stride: a segment has one window, and for each `stride` further tokens at most one more.
    """

    stride: int = 1

    def with_lengths(self, lengths: Sequence[int]) -> Windows:
        """Other windows of the same size."""
        segments = Segments.of(lengths, self.cu_seqlens.device)
        return Windows(segments.lengths, segments.cu_seqlens, self.max_seqlen, stride=self.stride)

    def padded_to(self, num_tokens: int, num_segments: int | None) -> Windows:
        """Append windows of padding, up to `num_tokens` tokens.

        Args:
            num_tokens: tokens in all.
            num_segments: maximum number of segments of a pack, all of which get the same number of windows; `None` for
                as few as possible.
        """
        num_windows = len(self) + (num_tokens - self.num_tokens) // self.max_seqlen + 1
        if num_segments is not None:
            num_windows = num_segments + num_tokens // self.stride + 1
        return self.with_lengths(self.padded(num_tokens, num_windows).lengths)


class TracedSegments:
    """`Segments` in a graph of `torch.export`, whose lengths are known on the device alone.

    Attributes:
        cu_seqlens: `(S + 1,)` int32 offsets.
        num_tokens, num_segments: T and S.
        max_seqlen: T, an upper bound.
        windows: as `Segments` has them.
    """

    def __init__(self, cu_seqlens: Tensor, num_tokens: int, windows: TracedSegments | None = None) -> None:
        self.cu_seqlens = cu_seqlens
        self.windows = windows
        self.num_segments = cu_seqlens.shape[0] - 1
        self.num_tokens = self.max_seqlen = num_tokens

    def lengthened(self, num_added: int) -> TracedSegments:
        """Each segment with so many more tokens."""
        more = num_added * torch.arange(self.num_segments + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return TracedSegments(self.cu_seqlens + more, self.num_tokens + num_added * self.num_segments)

    def of_one_token(self) -> TracedSegments:
        """One segment of one token for each of these."""
        offsets = torch.arange(self.num_segments + 1, dtype=torch.int32, device=self.cu_seqlens.device)
        return TracedSegments(offsets, self.num_segments)

    def to(self, device: torch.device) -> TracedSegments:
        """The same, since an exported graph is on one device."""
        return self

    def index(self) -> Tensor:
        """Index of each token's segment, `(T,)` int64."""
        lengths = self.cu_seqlens.diff().long()
        indices = torch.arange(self.num_segments, device=lengths.device)
        return indices.repeat_interleave(lengths, output_size=self.num_tokens)

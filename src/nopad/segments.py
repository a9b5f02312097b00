"""Segments of a pack: consecutive tokens that attend to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Lengths and offsets of the segments of a pack.

    `lengths` stays on the host, so that `cu_seqlens` is never read back from the device.

    Attributes:
        lengths: tokens in each segment, S ints.
        cu_seqlens: `(S + 1,)` int32 offsets on the device of the tokens.
        max_seqlen: tokens in the longest segment, 0 for an empty pack, or any upper bound.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Segments:
        """Segments of the given lengths, with offsets on `device`."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), offsets.to(device, non_blocking=True), max(lengths, default=0))

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in all segments."""
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

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
            copies[device] = Segments(self.lengths, self.cu_seqlens.to(device), self.max_seqlen)
        return copies[device]

    def index(self) -> Tensor:
        """Index of each token's segment, `(T,)` int64 on the device; no host read."""
        lengths = self.cu_seqlens.diff().long()
        indices = torch.arange(len(self), device=lengths.device)
        return indices.repeat_interleave(lengths, output_size=self.num_tokens)

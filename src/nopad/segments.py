"""Segments of a pack: the stretches of tokens that attend to each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Segments:
    """Where each segment of a pack begins and ends.

    `lengths` stays on the host, so that nobody has to read `cu_seqlens` back from the device.

    Attributes:
        lengths: tokens in each segment, S ints.
        cu_seqlens: `(S + 1,)` int32 offsets on the device of the tokens.
        max_seqlen: tokens in the longest segment, 0 where there is none, or any number above.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Segments:
        """Offsets of segments of the given lengths, on `device`."""
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(tuple(lengths), offsets.to(device, non_blocking=True), max(lengths, default=0))

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all segments together."""
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def filled_up(self, rows: int, slots: int) -> Segments:
        """The same segments and, after them, more that take what is left of `rows` rows, as evenly as can be.

        Raises:
            ValueError: more tokens than `rows`, or as many segments as `slots`.
        """
        left, free = rows - self.num_tokens, slots - len(self)
        if left < 0 or free < 1:
            raise ValueError(
                f"expected at most {rows} tokens in fewer than {slots} segments, got {self.num_tokens} in {len(self)}"
            )
        each, more = divmod(left, free)
        filler = [each + 1] * more + [each] * (free - more)
        return Segments.of([*self.lengths, *filler], self.cu_seqlens.device)

    def index(self) -> Tensor:
        """Segment number of each token, `(T,)` int64 on the device; no host read."""
        lengths = self.cu_seqlens.diff().long()
        numbers = torch.arange(len(self), device=lengths.device)
        return numbers.repeat_interleave(lengths, output_size=self.num_tokens)

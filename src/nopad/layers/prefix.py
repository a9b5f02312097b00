"""Prefix tokens, such as CLS and registers, in front of the patches of each segment."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nopad.layout import Layout
from nopad.segments import Segments


@dataclasses.dataclass(frozen=True)
class PrefixLayout:
    """Where patches and prefix tokens stand, once each segment begins with its prefix.

    Attributes:
        segments: one per image or frame, prefix tokens and patches.
        patches: `(T,)` row of each patch.
        prefix: `(S, number)` rows of each segment's prefix tokens.
    """

    segments: Segments
    patches: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, layout: Layout, number: int) -> PrefixLayout:
        """Make room for `number` prefix tokens in front of each frame; no host read."""
        device = layout.device
        segments = Segments.of([length + number for length in layout.frames.lengths], device)
        patches = torch.arange(layout.num_patches, device=device) + number * (layout.frame_index + 1)
        prefix = segments.cu_seqlens[:-1].long()[:, None] + torch.arange(number, device=device)
        return cls(segments, patches, prefix)

    def join(self, patches: Tensor, prefix: Tensor) -> Tensor:
        """`(T, ...)` patches and `(S, number, ...)` prefix tokens to all rows of the pack, in the wider dtype of both.

        They differ under autocast, which leaves the prefix of a float32 model in float32.
        """
        dtype = torch.promote_types(patches.dtype, prefix.dtype)
        rows = patches.new_empty(self.segments.num_tokens, *patches.shape[1:], dtype=dtype)
        rows.index_copy_(0, self.patches, patches.to(dtype))
        return rows.index_copy_(0, self.prefix.flatten(), prefix.flatten(0, 1).to(dtype))

    def take_patches(self, rows: Tensor) -> Tensor:
        """Those of the patches, `(T, D)`."""
        return rows.index_select(0, self.patches)

    def take_prefix(self, rows: Tensor) -> Tensor:
        """Those of each segment's prefix tokens, `(S, number, D)`."""
        return rows.index_select(0, self.prefix.flatten()).unflatten(0, self.prefix.shape)

"""Prefix tokens, such as CLS and registers, before the patches of each segment."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nopad.layout import Layout
from nopad.segments import Segments


@dataclasses.dataclass(frozen=True)
class PrefixLayout:
    """Rows of patches and prefix tokens in a pack whose segments begin with prefix tokens.

    Attributes:
        segments: one per image or frame, prefix tokens included.
        patches: `(T,)` row of each patch.
        prefix: `(S, num_prefix_tokens)` rows of each segment's prefix tokens.
    """

    segments: Segments
    patches: Tensor
    prefix: Tensor

    @classmethod
    def of(cls, layout: Layout, num_prefix_tokens: int) -> PrefixLayout:
        """Layout with `num_prefix_tokens` rows before each frame; no host read."""
        return cls.of_segments(layout.frames, layout.frame_index, num_prefix_tokens)

    @classmethod
    def of_segments(cls, segments: Segments, index: Tensor, num_prefix_tokens: int) -> PrefixLayout:
        """Layout with `num_prefix_tokens` rows before each segment; `index` is the segment of each patch, `(T,)`."""
        device = index.device
        segments = segments.lengthened(num_prefix_tokens)
        patches = torch.arange(index.shape[0], device=device) + num_prefix_tokens * (index + 1)
        prefix = segments.cu_seqlens[:-1].long()[:, None] + torch.arange(num_prefix_tokens, device=device)
        return cls(segments, patches, prefix)

    def join(self, patches: Tensor, prefix: Tensor) -> Tensor:
        """All rows of the pack, from `(T, ...)` patches and `(S, num_prefix_tokens, ...)` prefix tokens.

        The result has the wider of both dtypes: under autocast, the prefix of a float32 model stays float32.
        """
        dtype = torch.promote_types(patches.dtype, prefix.dtype)
        rows = patches.new_empty(self.segments.num_tokens, *patches.shape[1:], dtype=dtype)
        rows.index_copy_(0, self.patches, patches.to(dtype))
        return rows.index_copy_(0, self.prefix.flatten(), prefix.flatten(0, 1).to(dtype))

    def take_patches(self, rows: Tensor) -> Tensor:
        """The rows of the patches, `(T, D)`, on the layout's device wherever the last layer has run."""
        return rows.to(self.patches.device).index_select(0, self.patches)

    def take_prefix(self, rows: Tensor) -> Tensor:
        """The rows of each segment's prefix tokens, `(S, num_prefix_tokens, D)`, on the layout's device."""
        return rows.to(self.prefix.device).index_select(0, self.prefix.flatten()).unflatten(0, self.prefix.shape)

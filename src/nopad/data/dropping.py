"""Patch dropping: a random part of each image's patches, as FLIP trains on (Li et al., arXiv:2212.00794)."""

from __future__ import annotations

import dataclasses

import torch

from nopad.counts import is_number
from nopad.layout import Layout
from nopad.packing import Pack


def num_retained(patches: int, rate: float) -> int:
    """Number of a frame's patches that are not dropped: rounded, and at least one."""
    return max(1, round(patches * (1 - rate)))


def check_rate(rate: float) -> None:
    """Raise `ValueError` unless `rate` is a part of the patches that leaves some."""
    if not is_number(rate) or not 0 <= rate < 1:
        raise ValueError(f"drop_patches: expected a rate from 0 to below 1, got {rate!r:.80}")


def drop_patches(pack: Pack, rate: float, generator: torch.Generator | None = None) -> Pack:
    """A pack with a random part of each frame's patches, in their order, and `patch_positions` for those that are left.

    Families with rotary embeddings over rows and columns of the whole image (DINOv3) and NaFlex, which resamples its
    positions for it, refuse such packs.

    Args:
        pack: whole grids.
        rate: part of the patches that is dropped; a frame keeps `round(patches · (1 - rate))`, and at least one.
        generator: a generator of the CPU; torch's default unless given.

    Returns:
        A pack whose `grid_thw` has `[1, 1, patches kept]` for each image or clip.

    Raises:
        ValueError: a rate out of its range, or a pack with `patch_positions`.
    """
    check_rate(rate)
    if pack.patch_positions is not None:
        raise ValueError("drop_patches: expected whole grids, got a pack with patch_positions")
    layout = Layout.of_grid(pack.grid_thw.tolist(), torch.device("cpu"))
    counts = torch.tensor([num_retained(length, rate) for length in layout.frames.lengths], dtype=torch.int64)
    frames, scores = layout.frame_index, torch.rand(layout.num_patches, generator=generator, dtype=torch.float64)
    ranking = torch.argsort(frames + scores)  # frame by frame, each in a random order
    place = torch.arange(layout.num_patches) - layout.frames.cu_seqlens[:-1].long()[frames]
    index = ranking[place < counts[frames]].sort().values
    per_image = torch.zeros(len(pack), dtype=torch.int64).index_add_(
        0, layout.image_index[index], torch.ones_like(index)
    )
    device = pack.hidden_states.device
    return dataclasses.replace(
        pack,
        hidden_states=pack.hidden_states[index.to(device)],
        grid_thw=torch.stack((torch.ones_like(per_image), torch.ones_like(per_image), per_image), dim=1),
        patch_positions=layout.coordinates[index].to(device),
    )

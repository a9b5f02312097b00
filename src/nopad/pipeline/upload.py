"""Patches of a pack from the host to the encoder's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nopad.environment import cpu_threads


class Uploader:
    """Lays the patches of a pack end to end and copies them to a device.

    To a GPU it is one copy out of pinned memory on a stream of its own, beside the kernels of the pack before; the host
    does not wait for it. torch's allocators keep the buffers of one pack for the next.

    Args:
        device: where the patches go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Patches `(t, P)` of each image to those of the pack, `(T, P)`, for kernels of the current stream."""
        if self.stream is None:
            return torch.cat(list(parts)).to(self.device)
        rows = sum(len(part) for part in parts)
        pinned = torch.empty(rows, parts[0].shape[1], dtype=parts[0].dtype, pin_memory=True)
        with cpu_threads(1):  # all cores decode: many threads would wait for the slowest to get one
            torch.cat(list(parts), out=pinned)
        with torch.cuda.stream(self.stream):
            patches = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        patches.record_stream(current)  # its memory is the copying stream's, which must not take it too early
        return patches

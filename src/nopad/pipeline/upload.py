"""Patches of a pack from the host to the encoder's device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nopad.environment import cpu_threads
from nopad.pipeline.image_processor import PreparedImage

if TYPE_CHECKING:
    from nopad.pipeline.device_decode import DeviceDecoder


class Uploader:
    """Lays the patches of a pack end to end and copies them to a device.

    To a GPU it is one copy out of pinned memory on a stream of its own, beside the kernels of the pack before and ahead
    of them; the host does not wait for it. torch's allocators keep the buffers of one pack for the next.

    Args:
        device: where the patches go.
        decoder: decodes images that are encoded still.
    """

    def __init__(self, device: torch.device, decoder: DeviceDecoder | None = None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.decoder = decoder

    def __call__(self, images: Sequence[PreparedImage]) -> Callable[[], Tensor]:
        """Start the copy of a pack, from any thread; what is returned gives the patches `(T, P)`.

        They are for kernels of the stream that is current where it is called.
        """
        if self.stream is None:
            patches = torch.cat([image.data for image in images]).to(self.device)
            return lambda: patches
        with torch.cuda.stream(self.stream):
            uploaded = self._upload(images)
            event = self.stream.record_event()

        def take() -> Tensor:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            uploaded.record_stream(current)  # its memory is the copying stream's, which must not take it too early
            return uploaded

        return take

    def _upload(self, images: Sequence[PreparedImage]) -> Tensor:
        here = [image for image in images if image.orientation is None]
        if len(here) == len(images):
            return self._copy(here)
        assert self.decoder is not None
        starts = [0, *itertools.accumulate(image.num_patches for image in images)]
        patches = torch.empty(starts[-1], self.decoder.patch_dim, dtype=torch.uint8, device=self.device)
        placed = list(zip(images, starts, strict=False))
        if here:
            copied, end = self._copy(here), 0
            for image, start in placed:
                if image.orientation is None:
                    end += image.num_patches
                    patches[start : start + image.num_patches] = copied[end - image.num_patches : end]
        encoded = [(image, start) for image, start in placed if image.orientation is not None]
        self.decoder([image for image, _ in encoded], [start for _, start in encoded], patches)
        return patches

    def _copy(self, images: Sequence[PreparedImage]) -> Tensor:
        parts = [image.data for image in images]
        pinned = torch.empty(sum(map(len, parts)), parts[0].shape[1], dtype=parts[0].dtype, pin_memory=True)
        with cpu_threads(1):  # all cores decode: many threads would wait for the slowest to get one
            torch.cat(parts, out=pinned)
        return pinned.to(self.device, non_blocking=True)

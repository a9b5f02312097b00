"""JPEGs to patches on a GPU: its JPEG engines decode, one kernel resizes all images of a call.

By nvJPEG, with the engines alone: at most one grey level from libjpeg-turbo, where its CUDA backends have three. An
image's pixels do not depend on those decoded beside it.
"""

from __future__ import annotations

import io
import logging
import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nopad.extras import install
from nopad.kernels.availability import has_triton
from nopad.pipeline import nvjpeg
from nopad.pipeline.image_processor import ImageProcessor, PreparedImage
from nopad.preprocessing.decode import load_image
from nopad.preprocessing.jpegs import simplejpeg, upright_size, upright_strides
from nopad.preprocessing.transforms import is_vertical_first

logger = logging.getLogger(__name__)

MAX_CALL_PIXELS = 1 << 28
"""Pixels that are decoded in one call: 0.8 GB."""
_ALIGNMENT = 256
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


_starting = threading.Lock()


def why_unavailable(device: torch.device) -> str | None:
    """Why JPEGs are not decoded on a device, and what to do; `None` where they are.

    The first call for a GPU starts its engines, which takes a second; others wait for it.
    """
    with _starting:
        return _why_unavailable(device)


def start_engines(device: torch.device) -> threading.Thread:
    """Begin to start the JPEG engines of a device in a thread, while weights are read."""

    def start() -> None:
        with suppress(Exception):  # what uses them raises
            if device.type == "cuda":
                why_unavailable(torch.empty(0, device=device).device)  # cuda:0 for cuda, as an encoder's

    thread = threading.Thread(target=start, name="nopad-engines", daemon=True)
    thread.start()
    return thread


@lru_cache
def _why_unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the encoder is on {device}"
    if simplejpeg is None or not nvjpeg.is_installed():
        return f"nvJPEG or simplejpeg is missing: {install('embed', 'gpu-decode')}"
    if not has_triton(device):
        return "Triton does not work here"
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(file, "JPEG")
    try:
        decoded = _engines(device).decode([np.frombuffer(file.getvalue(), np.uint8)])
    except (OSError, RuntimeError) as error:
        return f"the GPU's JPEG engines do not work: {(str(error) or repr(error)).splitlines()[0]}"
    return "this GPU has no JPEG engine" if decoded[0] is None else None


@lru_cache
def _engines(device: torch.device) -> _Engines:
    """The JPEG engines of a device, made once."""
    return _Engines(device)


class _Engines:
    """The JPEG engines of a GPU, by one decoder: where two are at work, each image waits for what the GPU computes.

    A second thread reads the headers of its files and describes what is to be resized while they decode for the first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._decoder = nvjpeg.Nvjpeg()
        self._lock = threading.Lock()
        self._done = torch.cuda.Event()
        self._in_use: Sequence[np.ndarray] = ()

    def decode(self, files: Sequence[np.ndarray]) -> Sequence[Tensor | None]:
        """Pixels `(H, W, 3)` on the device, for kernels of the current stream; `None` where the engines refuse."""
        images = _empty([self._decoder.size(file) for file in files], self._device)
        supported = [(file, image) for file, image in zip(files, images, strict=True) if image is not None]
        stream = torch.cuda.current_stream(self._device)
        with self._lock, torch.cuda.device(self._device):
            self._done.synchronize()  # the decoder has one set of buffers
            self._in_use = files
            try:
                self._decoder.decode(
                    [file for file, _ in supported],
                    [image.data_ptr() for _, image in supported],
                    [image.stride(0) for _, image in supported],
                    stream.cuda_stream,
                )
            except nvjpeg.NvjpegError as error:
                logger.warning("a GPU's engines decode nothing of %d JPEGs, the CPU does: %s", len(files), error)
                images = [None] * len(files)
            self._done.record(stream)
            return images


def _empty(sizes: Sequence[tuple[int, int] | None], device: torch.device) -> list[Tensor | None]:
    """Uninitialised images `(H, W, 3)` uint8 of these sizes, in one allocation."""
    lengths = [3 * math.prod(size) if size else 0 for size in sizes]
    aligned = [-(-length // _ALIGNMENT) * _ALIGNMENT for length in lengths]
    parts = torch.empty(sum(aligned), dtype=torch.uint8, device=device).split(aligned)
    return [
        part[:length].view(*size, 3) if size else None for part, length, size in zip(parts, lengths, sizes, strict=True)
    ]


def as_jpeg(pixels: Tensor, image_processor: ImageProcessor) -> PreparedImage:
    """An image `(3, H, W)` as a file that a `DeviceDecoder` takes."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG")
    height, width = pixels.shape[1:]
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return PreparedImage(data, image_processor.grid_of(height, width), width, height, orientation=1)


class DeviceDecoder:
    """Decodes and resizes JPEGs on a GPU.

    Args:
        image_processor: has the rule; its patches are uint8.
        device: the GPU.

    Attributes:
        patch_dim: numbers of a patch.
    """

    def __init__(self, image_processor: ImageProcessor, device: torch.device) -> None:
        self._image_processor = image_processor
        self._device = device
        self._engines = _engines(device)
        self.patch_dim = 3 * image_processor.temporal_patch_size * image_processor.patch_size**2

    def __call__(self, images: Sequence[PreparedImage], starts: Sequence[int], patches: Tensor) -> None:
        """Write the patches of images that are encoded still.

        Args:
            starts: the first row of each image's patches.
            patches: `(T, P)` uint8 on the device.
        """
        call: list[tuple[PreparedImage, int]] = []
        pixels = 0
        for image, start in zip(images, starts, strict=True):
            if call and pixels + image.width * image.height > MAX_CALL_PIXELS:
                self._run(call, patches)
                call, pixels = [], 0
            call.append((image, start))
            pixels += image.width * image.height
        if call:
            self._run(call, patches)

    def _run(self, call: Sequence[tuple[PreparedImage, int]], patches: Tensor) -> None:
        decoded = self._engines.decode([image.data.numpy() for image, _ in call])
        descriptions = []
        scratch = _ScratchSizes()
        for (image, start), pixels in zip(call, decoded, strict=True):
            assert image.orientation is not None
            stored = upright_size(image.width, image.height, image.orientation)  # turned back it is what it was
            if pixels is None or pixels.shape != (*stored, 3):
                self._on_cpu(image, start, patches)
            else:
                descriptions.append(self._describe(image, start, pixels, scratch))
        if descriptions:
            self._resize(descriptions, scratch, patches)

    def _on_cpu(self, image: PreparedImage, start: int, patches: Tensor) -> None:
        """Decode here a file that was checked, and that the engines refuse all the same."""
        logger.info("a JPEG of %d×%d goes the way of the CPU: the GPU's engines refuse it", image.width, image.height)
        prepared = self._image_processor(load_image(image.data.numpy().tobytes()))
        patches[start : start + prepared.num_patches] = prepared.data.to(self._device)

    def _describe(self, image: PreparedImage, start: int, pixels: Tensor, scratch: _ScratchSizes) -> list[int]:
        processor = self._image_processor
        height, width, _ = pixels.shape
        assert image.orientation is not None
        offset, to_row, to_column = upright_strides(width, height, pixels.stride(0), image.orientation)
        place = processor.rule.place(image.height, image.width, processor.patch_size)
        support = _SUPPORT[processor.rule.resample]
        patch = processor.patch_size
        axes = [
            (to_row, image.height, place.height, place.top, place.rows * patch),
            (to_column, image.width, place.width, place.left, place.columns * patch),
        ]
        is_turned = is_vertical_first(image.height, image.width, place.height, place.width)
        strides, before, after, first, cropped = zip(*(reversed(axes) if is_turned else axes), strict=True)
        widths = [math.ceil(support * max(b / a, 1.0)) * 2 + 1 for b, a in zip(before, after, strict=True)]
        offsets = [scratch.add_weights(number * width) for number, width in zip(cropped, widths, strict=True)]
        between = scratch.add_pixels(before[0] * cropped[1] * 3)
        scratch.max_sizes = tuple(map(max, scratch.max_sizes, (before[0], *cropped)))  # pyright: ignore
        address = pixels.data_ptr() + offset
        return [address, *strides, *before, *after, *first, *cropped, *offsets, *widths, between, start, is_turned]

    def _resize(self, descriptions: list[list[int]], scratch: _ScratchSizes, patches: Tensor) -> None:
        from nopad.kernels.triton_resize import resize_to_patches

        processor = self._image_processor
        host = torch.tensor(descriptions, dtype=torch.int64).pin_memory()
        weights, starts = torch.empty(2, scratch.weights, dtype=torch.int32, device=self._device)
        between = torch.empty(scratch.pixels, dtype=torch.uint8, device=self._device)
        resize_to_patches(
            host.to(self._device, non_blocking=True),
            scratch.max_sizes,
            weights,
            starts,
            between,
            patches,
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            channels_last=processor.patch_order == "hwc",
            bicubic=processor.rule.resample == "bicubic",
        )


class _ScratchSizes:
    """Sizes of the buffers of a call, for the weights and for the pixels between the passes of all its images."""

    def __init__(self) -> None:
        self.weights = self.pixels = 0
        self.max_sizes = (0, 0, 0)

    def add_weights(self, number: int) -> int:
        start = self.weights
        self.weights += number
        return start

    def add_pixels(self, number: int) -> int:
        start = self.pixels
        self.pixels += number
        return start

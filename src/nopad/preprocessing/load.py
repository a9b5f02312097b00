"""Pixels of an image or a clip, however it is given: a file, a video, bytes, an object, a list of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nopad.preprocessing.decode import ImageError, Source, load_image, measure_image
from nopad.preprocessing.files import read_regular
from nopad.preprocessing.formats import VIDEO_SUFFIXES
from nopad.preprocessing.limits import MAX_PIXELS, NUM_FRAMES
from nopad.preprocessing.video import read_frames
from nopad.preprocessing.video_file import measure_video


def load(source: Source | Sequence[Source], *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image, or a clip: a list of frames, a uint8 array `(frames, H, W, 3)` or tensor `(frames, 3, H, W)`.

    A path with the suffix of a video gives a clip of `NUM_FRAMES` frames, spread evenly over it.

    Returns:
        uint8 `(3, H, W)` for an image, `(frames, 3, H, W)` for a clip, of one frame too.

    Raises:
        ImageError: see `load_image`; also no frames, or frames of different sizes.
    """
    if isinstance(source, str | Path) and Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return read_frames(source, NUM_FRAMES, max_pixels=max_pixels)
    is_clip = source.ndim == 4 if isinstance(source, np.ndarray | Tensor) else isinstance(source, list | tuple)
    if not is_clip:
        return load_image(cast(Source, source), max_pixels=max_pixels)
    frames = [load_image(frame, max_pixels=max_pixels) for frame in cast(Sequence[Source], source)]
    sizes = sorted({(frame.shape[1], frame.shape[2]) for frame in frames})
    if len(sizes) != 1:
        got = f"got (height, width) {', '.join(map(str, sizes))}" if sizes else "got none"
        raise ImageError(f"clip of {len(frames)} frames", f"expected frames of one size, {got}")
    return torch.stack(frames)


def snapshot(source: Source | Sequence[Source]) -> Source | Sequence[Source] | ImageError:
    """A copy of a source that later changes do not affect: pixels of an object; names and bytes as they are.

    PIL images, arrays and tensors may change once they have been handed over, and a PIL image must not be loaded by two
    threads. For an object that cannot be loaded, its error is returned, and `load_snapshot` raises it.
    """
    if isinstance(source, str | Path | bytes):
        return source
    if isinstance(source, list | tuple) and source and all(isinstance(frame, str | Path | bytes) for frame in source):
        return tuple(source)
    try:
        pixels = load(source)
    except ImageError as error:
        return error
    return pixels.clone() if pixels is source else pixels


def load_snapshot(source: Source | Sequence[Source] | ImageError) -> Tensor:
    """Decode what `snapshot` returned.

    Raises:
        ImageError: as `load`.
    """
    if isinstance(source, ImageError):
        raise source
    return load(source)


def measure_snapshot(source: Source | Sequence[Source] | ImageError) -> tuple[int, int, int]:
    """Frames, pixels of all of them, and bytes that decoding takes of what `snapshot` returned.

    By the header; 0 pixels and bytes where that cannot be read, or has more than `load` takes: decoding then fails.
    """
    if isinstance(source, ImageError):
        return 1, 0, 0
    if isinstance(source, Tensor):
        return (len(source) if source.ndim == 4 else 1), source.numel() // 3, 0  # decoded already
    if isinstance(source, tuple):
        _, pixels, sizes = zip(*map(measure_snapshot, source), strict=True)
        return len(source), sum(pixels), sum(sizes)
    if isinstance(source, str | Path) and Path(source).suffix.lower() in VIDEO_SUFFIXES:
        return measure_video(source, NUM_FRAMES, max_pixels=MAX_PIXELS)
    try:
        data = source if isinstance(source, bytes) else read_regular(cast(str, source))
    except (OSError, ValueError):
        return 1, 0, 0
    width, height, size = measure_image(data) or (0, 0, 0)
    return (1, width * height, size) if width * height <= MAX_PIXELS else (1, 0, 0)

"""Frames spread evenly over a video, decoded with PyAV."""

from __future__ import annotations

import bisect
import io
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nopad.preprocessing.decode import MAX_PIXELS, ImageError

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

Video = str | os.PathLike[str] | bytes
"""A path, or a file's bytes."""


def read_frames(source: Video, number: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode `number` frames, spread evenly over the video in the order in which they are shown.

    The video's `F` frames are cut into `number` equal spans and the middle of each is taken: frame
    `(2i + 1) · F // (2 · number)`, or every frame where there are no more than that. `F` is counted, since headers only
    claim it. Frames are turned upright by the video's display matrix.

    Args:
        source: see `Video`; the first video stream is read that is no cover picture.
        number: frames wanted, at least 1.
        max_pixels: refuse larger frames, told by the header before anything is decoded.

    Returns:
        uint8 `(min(number, F), 3, H, W)`, a channels-last view.

    Raises:
        ImageError: no video, no frame in it, cut short or damaged, too large, frames of different sizes, no PyAV.
        ValueError: `number` below 1.
    """
    if number < 1:
        raise ValueError(f"number: expected frames ≥ 1, got {number}")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        import av.error
    except ImportError as error:
        raise ImageError(name, "reading a video needs PyAV: pip install 'nopad[video]'") from error
    try:
        pictures = _pictures(source, number, max_pixels)
    except _UnusableError as error:
        raise ImageError(name, str(error)) from error
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(name, f"no video that can be read, or damaged ({type(error).__name__}: {reason})") from error
    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) != 1:
        raise ImageError(name, f"expected frames of one size, got (height, width) {', '.join(map(str, sizes))}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


class _UnusableError(Exception):
    pass


@dataclass(frozen=True)
class _Index:
    """What the packets tell without decoding; `times` in the order shown, `keys` where decoding can start."""

    count: int
    times: list[int] | None
    keys: list[int]


def _pictures(source: Video, number: int, max_pixels: int) -> list[np.ndarray]:
    with _open(source) as container:
        stream = _stream(container, max_pixels)
        index = _scan(container, stream)
    if index.times is not None:
        wanted = [index.times[i] for i in _middles(index.count, number)]
        with _open(source) as container:
            pictures = _seek(container, _stream(container, max_pixels), wanted, index, max_pixels)
        if pictures is not None:
            return pictures
    pictures, found = _decode(source, index.count, number, max_pixels)
    if found != index.count:  # a packet is a frame in most codecs; where it is not, the decoded frames are what counts
        pictures, _ = _decode(source, found, number, max_pixels)
    if not pictures:
        raise _UnusableError("no frame in its video stream")
    return pictures


def _middles(count: int, number: int) -> list[int]:
    number = min(number, count)
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]


def _open(source: Video) -> InputContainer:
    import av

    # Playlists pass for videos too: they must not reach for the network. An absolute path is never read as a protocol.
    file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    return av.open(file, "r", metadata_errors="replace", options={"protocol_whitelist": "file"})


def _stream(container: InputContainer, max_pixels: int) -> VideoStream:
    from av.stream import Disposition

    videos = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    stream = next(videos, None)
    if stream is None:
        raise _UnusableError("no video stream in it")
    _check_size(stream.codec_context.width, stream.codec_context.height, max_pixels)
    stream.codec_context.thread_count = 1  # the caller decodes many files at a time
    return stream


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _UnusableError(f"frames of {width}×{height} are {width * height} pixels, expected at most {max_pixels}")


def _scan(container: InputContainer, stream: VideoStream) -> _Index:
    times: list[int | None] = []
    keys: list[int] = []
    cut_short = False
    for packet in container.demux(stream):
        if not packet.size:
            continue
        cut_short = packet.is_corrupt
        if not packet.is_discard:  # outside an edit list: decoded, but not shown
            times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
    if cut_short:
        raise _UnusableError(f"truncated: the last of {len(times)} frames is not whole; get the file again")
    known = sorted(time for time in times if time is not None)
    is_unique = len(set(known)) == len(times) > 0
    return _Index(len(times), known if is_unique else None, sorted(keys))


def _seek(
    container: InputContainer, stream: VideoStream, wanted: Sequence[int], index: _Index, max_pixels: int
) -> list[np.ndarray] | None:
    """The frames at the `wanted` times, over the key frames before them; `None` where that does not find them."""
    import av.error

    assert index.times is not None
    position = index.times[0]
    frames: Iterator[VideoFrame] = container.decode(stream)
    pictures = []
    for time in wanted:
        before = bisect.bisect_right(index.keys, time)
        try:
            if before and index.keys[before - 1] > position:
                container.seek(index.keys[before - 1], stream=stream)
                frames = container.decode(stream)
            frame = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
        except av.error.FFmpegError:
            return None
        if frame is None or frame.pts != time or frame.is_corrupt:
            return None
        position = time
        pictures.append(_upright(frame, max_pixels))
    return pictures


def _decode(source: Video, total: int, number: int, max_pixels: int) -> tuple[list[np.ndarray], int]:
    """The frames wanted of `total`, and how many frames there are; decodes all."""
    pictures = []
    count = 0
    wanted = set(_middles(total, number))
    with _open(source) as container:
        for frame in container.decode(_stream(container, max_pixels)):
            if count in wanted:
                if frame.is_corrupt:
                    raise _UnusableError(f"frame {count} is damaged; get the file again")
                pictures.append(_upright(frame, max_pixels))
            count += 1
    return pictures, count


def _upright(frame: VideoFrame, max_pixels: int) -> np.ndarray:
    _check_size(frame.width, frame.height, max_pixels)
    return np.rot90(frame.to_ndarray(format="rgb24"), math.floor(frame.rotation / 90 + 0.5))

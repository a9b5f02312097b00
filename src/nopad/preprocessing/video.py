"""Frames spread evenly over a video, decoded with PyAV."""

from __future__ import annotations

import bisect
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nopad.counts import counted
from nopad.extras import install
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.last_frame import LastPackets
from nopad.preprocessing.limits import MAX_PIXELS
from nopad.preprocessing.video_file import (
    UnusableVideoError,
    Video,
    check_container,
    check_frame_size,
    open_video,
    shown_size,
    video_stream,
)

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer

# The end of such files is no part of their structure: where they are cut, their last frame is not whole.
_WITHOUT_END = ("mpeg", "mpegts", "mpegvideo")


def read_frames(
    source: Video, num_frames: int, *, span: tuple[float, float] | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode `num_frames` frames, spread evenly over the video in the order in which they are shown.

    The video's `F` frames are cut into `num_frames` equal spans and the middle of each is taken: frame
    `(2i + 1) · F // (2 · num_frames)`, or every frame where there are no more than that. `F` is counted: headers may be
    wrong. Frames are turned upright by the video's display matrix. Pixels that are not square become square: the
    shorter side of a pixel is stretched (bicubic), so that frames have the shape in which a player shows them.

    Read are MP4 and MOV, Matroska and WebM, AVI, MPEG, FLV, Ogg, WMV and GIF with the usual codecs. A file that is cut
    short is an error in all of them, where it can be detected: by its structure, and by the last frame of MPEG streams.

    Args:
        source: see `Video`; the first video stream is read that is no cover picture.
        num_frames: number of frames, at least 1.
        span: seconds from the first frame, beginning and end: the frames are spread over those that begin in between.
            Where the two are equal it is the one frame that is shown at that time.
        max_pixels: refuse larger frames, by the header, before anything is decoded.

    Returns:
        uint8 `(min(num_frames, F), 3, H, W)`, a channels-last view.

    Raises:
        ImageError: no video, no frame in it, another container or codec, cut short or damaged, an index of more
            samples than the file can hold, too large, frames of different sizes, no PyAV.
        ValueError: `num_frames` below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: expected ≥ 1, got {num_frames}")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        import av.error
    except ImportError as error:
        raise ImageError(name, f"reading a video needs PyAV: {install('video')}") from error
    try:
        images = _read_frames(source, num_frames, span, max_pixels)
    except UnusableVideoError as error:
        raise ImageError(name, str(error)) from error
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(name, f"no video that can be read, or damaged ({type(error).__name__}: {reason})") from error
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) != 1:
        raise ImageError(name, f"expected frames of one size, got (height, width) {', '.join(map(str, sizes))}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _Index:
    """Metadata of the packets, without decoding; `times` in the order shown, `keys` where decoding can start."""

    count: int
    times: list[int] | None
    keys: list[int]


def _read_frames(source: Video, num_frames: int, span: tuple[float, float] | None, max_pixels: int) -> list[np.ndarray]:
    size = check_container(source)
    with open_video(source, max_pixels) as container:
        stream = video_stream(container, max_pixels)
        index = _scan(container, stream, size)
        unit = float(stream.time_base or 0)
    if span is not None and not (index.times and unit):
        raise UnusableVideoError("its frames have no times, by which a part of it could be found")
    if index.times is not None:
        times = index.times if span is None else _within(index.times, unit, span)
        chosen = [times[i] for i in _middles(len(times), num_frames)]
        with open_video(source, max_pixels) as container:
            images = _seek(container, video_stream(container, max_pixels), chosen, index, max_pixels)
        if images is not None:
            return images
        if span is not None:
            raise UnusableVideoError(f"no frame can be decoded at {span[0]:g} s, damaged?")
    images, num_decoded = _decode(source, index.count, num_frames, max_pixels)
    # A packet is a frame in most codecs; where it is not, the decoded frames are what counts.
    if num_decoded != index.count:
        images, _ = _decode(source, num_decoded, num_frames, max_pixels)
    if not images:
        raise UnusableVideoError("no frame in its video stream")
    return images


def _within(times: list[int], unit: float, span: tuple[float, float]) -> list[int]:
    """The times of a span's frames; of a moment that of the frame that is shown then."""
    start, stop = (times[0] + edge / unit for edge in span)
    slack = 0.5  # of a unit: what seconds lose by rounding
    first = bisect.bisect_left(times, start - slack)
    if span[0] == span[1]:
        shown = bisect.bisect_right(times, start + slack) - 1
        if start > times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1) + slack:
            raise UnusableVideoError(
                f"its last frame begins at {(times[-1] - times[0]) * unit:g} s, none at {span[0]:g} s"
            )
        return [times[shown]]
    last = bisect.bisect_left(times, stop - slack)
    if first == last:
        raise UnusableVideoError(f"no frame begins from {span[0]:g} to {span[1]:g} s")
    return times[first:last]


def _middles(count: int, num_frames: int) -> list[int]:
    num_frames = min(num_frames, count)
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def _scan(container: InputContainer, stream: VideoStream, size: int) -> _Index:
    times = array("q")
    keys = array("q")
    count = total = 0
    is_cut = False
    has_end = container.format.name not in _WITHOUT_END
    tail = LastPackets()
    for packet in container.demux():
        total += packet.size
        if total > 4 * size:
            raise UnusableVideoError(
                f"its packets are more than four times the {size} bytes of the file; get the file again"
            )
        if not packet.size or packet.stream_index != stream.index:
            continue
        is_cut = packet.is_corrupt
        if not packet.is_discard:  # outside an edit list: decoded, but not shown
            count += 1
            if packet.pts is not None:
                times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append(packet.pts)
        if not has_end:
            tail.append(packet)
    if is_cut or tail.is_last_damaged(stream):
        raise UnusableVideoError(f"truncated: the last of {counted(count, 'frame')} is not whole; get the file again")
    distinct = np.unique(np.frombuffer(times, np.int64))
    return _Index(count, distinct.tolist() if len(distinct) == count > 0 else None, sorted(keys))


def _seek(
    container: InputContainer, stream: VideoStream, chosen: Sequence[int], index: _Index, max_pixels: int
) -> list[np.ndarray] | None:
    """The frames at the `chosen` times, over the key frames before them; `None` where that does not find them."""
    import av.error

    assert index.times is not None
    position = index.times[0]
    frames: Iterator[VideoFrame] = container.decode(stream)
    images = []
    for time in chosen:
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
        images.append(_upright(frame, stream, max_pixels))
    return images


def _decode(source: Video, total: int, num_frames: int, max_pixels: int) -> tuple[list[np.ndarray], int]:
    """The chosen frames of `total`, and how many frames there are; decodes all."""
    images = []
    count = 0
    chosen = set(_middles(total, num_frames))
    with open_video(source, max_pixels) as container:
        stream = video_stream(container, max_pixels)
        for frame in container.decode(stream):
            if count in chosen:
                if frame.is_corrupt:
                    raise UnusableVideoError(f"frame {count} is damaged; get the file again")
                images.append(_upright(frame, stream, max_pixels))
            count += 1
    return images, count


def _upright(frame: VideoFrame, stream: VideoStream, max_pixels: int) -> np.ndarray:
    width, height = shown_size(frame.width, frame.height, stream)
    check_frame_size(width, height, max_pixels)
    if (width, height) == (frame.width, frame.height):
        pixels = frame.to_ndarray(format="rgb24")
    else:
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return np.rot90(pixels, math.floor(frame.rotation / 90 + 0.5))

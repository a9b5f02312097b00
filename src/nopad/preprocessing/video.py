"""Frames spread evenly over a video, decoded with PyAV."""

from __future__ import annotations

import bisect
import io
import math
import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nopad.counts import counted
from nopad.preprocessing import containers
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.files import open_regular, why
from nopad.preprocessing.limits import MAX_PIXELS

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream
    from av.container import InputContainer

Video = str | os.PathLike[str] | bytes
"""A path, or a file's bytes."""

# FFmpeg's names. None of these containers names other files to read, as playlists and scripts do (concat, hls, dash).
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,gif,apng"
_VIDEO_DECODERS = (
    *("h264", "hevc", "vvc", "av1", "libdav1d", "vp8", "libvpx", "vp9", "libvpx-vp9", "vp3", "vp6", "vp6f", "theora"),
    *("mpeg1video", "mpeg2video", "mpegvideo", "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "h263", "flv", "wmv1"),
    *("wmv2", "wmv3", "vc1", "mjpeg", "prores", "dnxhd", "dvvideo", "ffv1", "huffyuv", "ffvhuff"),
    *("utvideo", "rawvideo", "qtrle", "png", "gif", "apng", "cinepak", "svq3"),
)
# FFmpeg opens decoders to find out what is in a file, those of sound, too.
_SOUND_DECODERS = ("aac", "mp3float", "mp3", "mp2", "ac3", "opus", "vorbis", "flac")
# The end of such files is no part of their structure: where they are cut, their last frame is not whole.
_WITHOUT_END = ("mpeg", "mpegts", "mpegvideo")
_MAX_TAIL_PACKETS = 1000


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
        num_frames: at least 1.
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
        raise ImageError(name, "reading a video needs PyAV: pip install 'nopad[video]'") from error
    try:
        pictures = _pictures(source, num_frames, span, max_pixels)
    except _UnusableError as error:
        raise ImageError(name, str(error)) from error
    except (av.error.FFmpegError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(name, f"no video that can be read, or damaged ({type(error).__name__}: {reason})") from error
    sizes = sorted({picture.shape[:2] for picture in pictures})
    if len(sizes) != 1:
        raise ImageError(name, f"expected frames of one size, got (height, width) {', '.join(map(str, sizes))}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def frame_size(source: Video) -> tuple[int, int] | None:
    """Width and height in square pixels by the header of a video, `None` where it cannot be read."""
    try:
        _check_container(source)
        with _open(source, MAX_PIXELS) as container:
            stream = _stream(container, MAX_PIXELS)
            return _shown_size(stream.codec_context.width, stream.codec_context.height, stream)
    except (ImportError, _UnusableError, OSError, ValueError, LookupError, RuntimeError):
        return None


class _UnusableError(Exception):
    pass


@dataclass(frozen=True)
class _Index:
    """Metadata of the packets, without decoding; `times` in the order shown, `keys` where decoding can start."""

    count: int
    times: list[int] | None
    keys: list[int]


def duration_seconds(source: Video) -> float | None:
    """How long a video is by its header, `None` where that does not say it or cannot be read."""
    try:
        _check_container(source)
        with _open(source, MAX_PIXELS) as container:
            stream = _stream(container, MAX_PIXELS)
            if stream.duration and stream.time_base:
                seconds = float(stream.duration * stream.time_base)
            else:
                seconds = (container.duration or 0) / 1_000_000  # FFmpeg's own unit
    except (ImportError, _UnusableError, OSError, ValueError, LookupError, RuntimeError):
        return None
    return seconds if 0 < seconds < math.inf else None


def _pictures(source: Video, num_frames: int, span: tuple[float, float] | None, max_pixels: int) -> list[np.ndarray]:
    size = _check_container(source)
    with _open(source, max_pixels) as container:
        stream = _stream(container, max_pixels)
        index = _scan(container, stream, size)
        unit = float(stream.time_base or 0)
    if span is not None and not (index.times and unit):
        raise _UnusableError("its frames have no times, by which a part of it could be found")
    if index.times is not None:
        times = index.times if span is None else _within(index.times, unit, span)
        wanted = [times[i] for i in _middles(len(times), num_frames)]
        with _open(source, max_pixels) as container:
            pictures = _seek(container, _stream(container, max_pixels), wanted, index, max_pixels)
        if pictures is not None:
            return pictures
        if span is not None:
            raise _UnusableError(f"no frame can be decoded at {span[0]:g} s, damaged?")
    pictures, num_decoded = _decode(source, index.count, num_frames, max_pixels)
    if (
        num_decoded != index.count
    ):  # a packet is a frame in most codecs; where it is not, the decoded frames are what counts
        pictures, _ = _decode(source, num_decoded, num_frames, max_pixels)
    if not pictures:
        raise _UnusableError("no frame in its video stream")
    return pictures


def _within(times: list[int], unit: float, span: tuple[float, float]) -> list[int]:
    """The times of a span's frames; of a moment that of the frame that is shown then."""
    start, stop = (times[0] + edge / unit for edge in span)
    slack = 0.5  # of a unit: what seconds lose by rounding
    first = bisect.bisect_left(times, start - slack)
    if span[0] == span[1]:
        shown = bisect.bisect_right(times, start + slack) - 1
        if start > times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1) + slack:
            raise _UnusableError(f"its last frame begins at {(times[-1] - times[0]) * unit:g} s, none at {span[0]:g} s")
        return [times[shown]]
    last = bisect.bisect_left(times, stop - slack)
    if first == last:
        raise _UnusableError(f"no frame begins from {span[0]:g} to {span[1]:g} s")
    return times[first:last]


def _check_container(source: Video) -> int:
    """Refuse what FFmpeg must not open, and return the size of the file in bytes."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(os.fsencode(source))
    except (OSError, ValueError) as error:
        raise _UnusableError(f"cannot be read: {why(error)}") from error
    with file:
        size = file.seek(0, os.SEEK_END)
        if problem := containers.problem(file):
            raise _UnusableError(problem)
    return size


def _middles(count: int, num_frames: int) -> list[int]:
    num_frames = min(num_frames, count)
    return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]


def _open(source: Video, max_pixels: int) -> InputContainer:
    import av

    options = {
        "format_whitelist": _CONTAINERS,
        "codec_whitelist": ",".join(_VIDEO_DECODERS + _SOUND_DECODERS),
        "protocol_whitelist": "file",
        # Of frames that FFmpeg decodes to find out their size, which is checked afterwards.
        "max_pixels": str(max(max_pixels, MAX_PIXELS)),
    }
    # An absolute path is never read as a protocol.
    file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
    return av.open(file, "r", metadata_errors="replace", options=options)


def _stream(container: InputContainer, max_pixels: int) -> VideoStream:
    from av.stream import Disposition

    videos = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    stream = next(videos, None)
    if stream is None:
        raise _UnusableError("no video stream in it")
    context = stream.codec_context
    decoder = "unknown to FFmpeg" if context is None else context.name
    if decoder not in _VIDEO_DECODERS:
        convert = "convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        raise _UnusableError(f"its codec is {decoder}, which is not read; {convert}")
    _check_size(*_shown_size(context.width, context.height, stream), max_pixels)
    context.thread_count = 1  # the caller decodes many files at a time
    context.options = {"max_pixels": str(max_pixels)}  # of each frame, whatever the header says
    return stream


def _shown_size(width: int, height: int, stream: VideoStream) -> tuple[int, int]:
    """The size of a frame in square pixels, none of which is lost."""
    ratio = stream.sample_aspect_ratio  # of a pixel's width to its height; None or 0 where nothing says it
    if not ratio or ratio == 1:
        return width, height
    return (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _UnusableError(f"frames of {width}×{height} are {width * height} pixels, expected at most {max_pixels}")


def _scan(container: InputContainer, stream: VideoStream, size: int) -> _Index:
    times = array("q")
    keys = array("q")
    count = total = 0
    is_cut = False
    has_end = container.format.name not in _WITHOUT_END
    tail: deque[Packet] = deque(maxlen=_MAX_TAIL_PACKETS)
    for packet in container.demux():
        total += packet.size
        if total > 4 * size:
            raise _UnusableError(
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
        if packet.is_keyframe:
            tail.clear()
        if not has_end:
            tail.append(packet)
    if is_cut or (tail and _is_last_frame_damaged(tail, stream)):
        raise _UnusableError(f"truncated: the last of {counted(count, 'frame')} is not whole; get the file again")
    known = np.unique(np.frombuffer(times, np.int64))
    return _Index(count, known.tolist() if len(known) == count > 0 else None, sorted(keys))


def _is_last_frame_damaged(tail: Sequence[Packet], stream: VideoStream) -> bool:
    """Decode the packets from the last key frame on."""
    import av.error

    if not tail[0].is_keyframe:
        return False
    last = None
    for packet in (*tail, None):
        try:
            last = next(reversed(stream.codec_context.decode(packet)), last)
        except av.error.FFmpegError:
            if packet is tail[-1]:
                return True
    return last is not None and last.is_corrupt


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
        pictures.append(_upright(frame, stream, max_pixels))
    return pictures


def _decode(source: Video, total: int, num_frames: int, max_pixels: int) -> tuple[list[np.ndarray], int]:
    """The frames wanted of `total`, and how many frames there are; decodes all."""
    pictures = []
    count = 0
    wanted = set(_middles(total, num_frames))
    with _open(source, max_pixels) as container:
        stream = _stream(container, max_pixels)
        for frame in container.decode(stream):
            if count in wanted:
                if frame.is_corrupt:
                    raise _UnusableError(f"frame {count} is damaged; get the file again")
                pictures.append(_upright(frame, stream, max_pixels))
            count += 1
    return pictures, count


def _upright(frame: VideoFrame, stream: VideoStream, max_pixels: int) -> np.ndarray:
    width, height = _shown_size(frame.width, frame.height, stream)
    _check_size(width, height, max_pixels)
    if (width, height) == (frame.width, frame.height):
        pixels = frame.to_ndarray(format="rgb24")
    else:
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    return np.rot90(pixels, math.floor(frame.rotation / 90 + 0.5))

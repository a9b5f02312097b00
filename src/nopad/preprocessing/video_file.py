"""Video files as they are opened: the containers and codecs that are read, and fields of a header."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from nopad.preprocessing import containers
from nopad.preprocessing.files import open_regular, why
from nopad.preprocessing.limits import MAX_PIXELS

if TYPE_CHECKING:
    from av import VideoStream
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
_Value = TypeVar("_Value")


class UnusableVideoError(Exception):
    """A video that is not read; the message is the reason."""


def frame_size(source: Video) -> tuple[int, int] | None:
    """Width and height in square pixels by the header of a video, `None` where it cannot be read."""

    def size(_: InputContainer, stream: VideoStream) -> tuple[int, int]:
        return shown_size(stream.codec_context.width, stream.codec_context.height, stream)

    return _from_header(source, size)


def measure_video(source: Video, frames: int, *, max_pixels: int) -> tuple[int, int, int]:
    """Frames, pixels of all of them, and bytes that decoding them takes, by the header.

    0 pixels and bytes where that cannot be read, or has frames of more than `max_pixels`.
    """
    width, height = frame_size(source) or (0, 0)
    if width * height > max_pixels:
        return frames, 0, 0
    # The frames and their stack as RGB, and what the codec refers to, which is at most 16 frames in H.264 and HEVC.
    return frames, frames * width * height, (2 * frames + 17) * 3 * width * height


def duration_seconds(source: Video) -> float | None:
    """Duration of a video by its header, `None` where that has none or cannot be read."""

    def duration(container: InputContainer, stream: VideoStream) -> float:
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1_000_000  # FFmpeg's own unit

    seconds = _from_header(source, duration)
    return seconds if seconds is not None and 0 < seconds < math.inf else None


def _from_header(source: Video, read: Callable[[InputContainer, VideoStream], _Value]) -> _Value | None:
    try:
        check_container(source)
        with open_video(source, MAX_PIXELS) as container:
            return read(container, video_stream(container, MAX_PIXELS))
    except (ImportError, UnusableVideoError, OSError, ValueError, LookupError, RuntimeError):
        return None


def check_container(source: Video) -> int:
    """Check the structure of a file before FFmpeg opens it, and return its size in bytes.

    Raises:
        UnusableVideoError: it cannot be read, is cut short, or has an index that claims more than the file can hold.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(os.fsencode(source))
    except (OSError, ValueError) as error:
        raise UnusableVideoError(f"cannot be read: {why(error)}") from error
    with file:
        size = file.seek(0, os.SEEK_END)
        if problem := containers.problem(file):
            raise UnusableVideoError(problem)
    return size


def open_video(source: Video, max_pixels: int) -> InputContainer:
    """Open a file of one of the containers that are read; it is closed as a context manager.

    Raises:
        ImportError: no PyAV.
        av.error.FFmpegError: another container, or a damaged file.
    """
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


def video_stream(container: InputContainer, max_pixels: int) -> VideoStream:
    """The first video stream that is no cover picture, set up to be decoded.

    Raises:
        UnusableVideoError: no such stream, a codec that is not read, or frames of more than `max_pixels`.
    """
    from av.stream import Disposition

    videos = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    stream = next(videos, None)
    if stream is None:
        raise UnusableVideoError("no video stream in it")
    context = stream.codec_context
    decoder = "unknown to FFmpeg" if context is None else context.name
    if decoder not in _VIDEO_DECODERS:
        convert = "convert it: ffmpeg -i IN -c:v libx264 OUT.mp4"
        raise UnusableVideoError(f"its codec is {decoder}, which is not read; {convert}")
    check_frame_size(*shown_size(context.width, context.height, stream), max_pixels)
    context.thread_count = 1  # the caller decodes many files at a time
    context.options = {"max_pixels": str(max_pixels)}  # of each frame, whatever is in the header
    return stream


def shown_size(width: int, height: int, stream: VideoStream) -> tuple[int, int]:
    """The size of a frame in square pixels, none of which is lost."""
    ratio = stream.sample_aspect_ratio  # of a pixel's width to its height; None or 0 where it is unknown
    if not ratio or ratio == 1:
        return width, height
    return (round(width * ratio), height) if ratio > 1 else (width, round(height / ratio))


def check_frame_size(width: int, height: int, max_pixels: int) -> None:
    """Raise `UnusableVideoError` for a frame of more than `max_pixels`."""
    if width * height > max_pixels:
        raise UnusableVideoError(
            f"frames of {width}×{height} are {width * height} pixels, expected at most {max_pixels}"
        )

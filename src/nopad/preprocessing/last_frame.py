"""Whether the last frame of a video is whole, where the end is no part of the container's structure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import Packet, VideoFrame, VideoStream

_MAX_PACKETS = 1000
# No start code is in them, by which FFmpeg would find another unit behind the frame.
_PADDINGS = (bytes(range(1, 256)), bytes(range(255, 0, -1)))


class LastPackets:
    """The packets of a video from the last but one of its key frames on."""

    def __init__(self) -> None:
        self._groups: deque[deque[Packet]] = deque(maxlen=2)

    def append(self, packet: Packet) -> None:
        """The next packet of the stream."""
        if packet.is_keyframe:
            self._groups.append(deque(maxlen=_MAX_PACKETS))
        if self._groups:
            self._groups[-1].append(packet)

    def is_last_damaged(self, stream: VideoStream) -> bool:
        """Decode them; returns whether the frame of the last one is damaged; one far from any key frame passes.

        FFmpeg does not notice where H.265 ends within a frame. It decodes the rest of the frame from whatever stands
        behind, which changes no frame that is whole.
        """
        import av.error

        groups = [group for group in self._groups if group[0].is_keyframe]
        if not groups:
            return False
        is_h265 = stream.codec_context.name == "hevc"
        packets = [*groups[-1]]
        if _is_leading(packets):
            packets = [packet for group in groups for packet in group]
        try:
            frames = [_last_frame(packets, stream, padding) for padding in (_PADDINGS if is_h265 else (b"",))]
        except av.error.FFmpegError:
            return True
        if _is_leading(packets):  # what it refers to is not there
            return False
        whole = [frame for frame in frames if frame is not None]
        if len(whole) < len(frames):
            return is_h265
        first, *others = whole
        return first.is_corrupt or any(_differ(first, other) for other in others)


def _differ(first: VideoFrame, other: VideoFrame) -> bool:
    return not np.array_equal(first.to_ndarray(format="rgb24"), other.to_ndarray(format="rgb24"))


def _is_leading(packets: Sequence[Packet]) -> bool:
    """Whether the last frame is shown before the first, a key frame: it may refer to frames before that, too."""
    first, last = packets[0].pts, packets[-1].pts
    return first is not None and last is not None and last < first


def _last_frame(packets: Sequence[Packet], stream: VideoStream, padding: bytes) -> VideoFrame | None:
    """The frame of the last packet, which of H.265 is that of its time, elsewhere maybe just the last one shown.

    Raises:
        FFmpegError: see `_decode`.
    """
    last = shown = None
    for frame in _decode(packets, stream, padding):
        shown = frame
        if frame.pts == packets[-1].pts:
            last = frame
    return last if last is not None or stream.codec_context.name == "hevc" else shown


def _decode(packets: Sequence[Packet], stream: VideoStream, padding: bytes = b"") -> Iterator[VideoFrame]:
    """The frames in the order in which they are shown, with the padding behind the last packet.

    Raises:
        FFmpegError: the last packet cannot be decoded.
    """
    import av.error

    *before, last = packets
    padded = av.Packet(bytes(last) + padding)
    padded.pts, padded.dts, padded.time_base = last.pts, last.dts, last.time_base
    padded.is_keyframe = last.is_keyframe
    stream.codec_context.flush_buffers()
    for packet in (*before, padded, None):
        try:
            yield from stream.codec_context.decode(packet)
        except av.error.FFmpegError:
            if packet is padded:
                raise

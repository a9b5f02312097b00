"""From the bytes of a picture, or the name of a video, to pixels: what the decode processes run."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nopad.embedding.inputs.extras import THUMBNAIL
from nopad.preprocessing.decode import ImageError, load_image, measure_image
from nopad.preprocessing.exif import read_exif
from nopad.preprocessing.files import FileRange, why
from nopad.preprocessing.jpegs import CheckedJpeg, check_jpeg
from nopad.preprocessing.limits import MAX_PIXELS, NUM_FRAMES
from nopad.preprocessing.thumbnails import thumbnail
from nopad.preprocessing.video import read_frames
from nopad.preprocessing.video_file import frame_size

_LARGE_BYTES = 1 << 22

Media = FileRange | bytes | str
"""The place of an encoded picture, its bytes, or the name of a video."""


class VideoPart(str):
    """The name of a video of which a part is read: `start` to `stop` in seconds, one frame where these are equal."""

    __slots__ = ("start", "stop")
    start: float
    stop: float

    @classmethod
    def of(cls, path: str, span: tuple[float, float] | None) -> str:
        """A part, or the name itself for the whole."""
        if span is None:
            return path
        part = cls(path)
        part.start, part.stop = span
        return part

    def __reduce__(self) -> tuple[Any, ...]:
        return VideoPart.of, (str(self), (self.start, self.stop))


@dataclass(frozen=True)
class MediaDecoder:
    """Decodes pictures, as `bytes`, and videos, by name.

    Args:
        frames: frames of a video, see `nopad.preprocessing.video.read_frames`.
        max_pixels: refuse larger pictures and frames.
        thumbnails: pixels of a side of thumbnails, `None` for none.
        exif: read when and where photos were taken.

    Raises:
        ValueError: `frames` or `max_pixels` below 1.
    """

    frames: int = NUM_FRAMES
    max_pixels: int = MAX_PIXELS
    thumbnails: int | None = None
    exif: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1 or self.max_pixels < 1:
            raise ValueError(f"frames, max_pixels: expected ≥ 1, got {self.frames} and {self.max_pixels}")

    def is_quick(self, media: Media) -> bool:
        """See `Decoder.is_quick`: pictures are, but for very large ones; videos are not."""
        return not isinstance(media, str) and not (isinstance(media, bytes) and len(media) >= _LARGE_BYTES)

    def size(self, media: Media) -> int:
        """The bytes that `read` takes into memory; 0 where they are there, are not read, or cannot be."""
        try:
            return media.num_bytes() if isinstance(media, FileRange) else 0
        except (OSError, ValueError):
            return 0

    def read(self, media: Media) -> bytes | str:
        """The bytes of a picture; a video is left where it is.

        Raises:
            ImageError: a file that cannot be read, or is empty.
        """
        if isinstance(media, FileRange):
            try:
                media = media.read()
            except (OSError, ValueError) as error:
                raise ImageError("file", f"cannot be read: {why(error)}") from error
        if not media:
            raise ImageError("file", "empty: 0 bytes")
        return media

    def measure(self, media: bytes | str) -> tuple[int, int, int]:
        """See `Decoder.measure`; a file without a readable header, or of too many pixels, fails when it is decoded."""
        if isinstance(media, bytes):
            width, height, size = measure_image(media) or (0, 0, 0)
            return (1, width * height, size) if width * height <= self.max_pixels else (1, 0, 0)
        width, height = frame_size(media) or (0, 0)
        frames = 1 if isinstance(media, VideoPart) and media.start == media.stop else self.frames
        if width * height > self.max_pixels:
            return frames, 0, 0
        # The frames and their stack as RGB, and what the codec refers to, which is at most 16 frames in H.264 and HEVC.
        return frames, frames * width * height, (2 * frames + 17) * 3 * width * height

    def __call__(self, media: bytes | str) -> Tensor:
        """Decode to uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a video, of fewer frames where it has fewer.

        Raises:
            ImageError: a file that is damaged, too large, or of a format that is not read.
        """
        if isinstance(media, bytes):
            return load_image(media, max_pixels=self.max_pixels)
        if not isinstance(media, VideoPart):
            return read_frames(media, self.frames, max_pixels=self.max_pixels)
        frames = read_frames(str(media), self.frames, span=(media.start, media.stop), max_pixels=self.max_pixels)
        return frames[0] if media.start == media.stop else frames

    def check_jpeg(self, media: bytes | str) -> CheckedJpeg | None:
        """See `Decoder.check_jpeg`."""
        if isinstance(media, str):
            return None
        return check_jpeg(media, max_pixels=self.max_pixels, min_side=2 * (self.thumbnails or 0) or 1)

    def extras(self, media: bytes | str, pixels: Tensor) -> dict[str, Any]:
        """See `Decoder.extras`: the columns of `nopad.embedding.inputs.extras` that were requested."""
        found: dict[str, Any] = read_exif(media) if self.exif and isinstance(media, bytes) else {}
        if self.thumbnails is not None:
            found[THUMBNAIL] = base64.b64encode(thumbnail(pixels, self.thumbnails)).decode()
        return found

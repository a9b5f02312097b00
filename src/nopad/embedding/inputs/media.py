"""From the bytes of an image, or the name of a video, to pixels: what the decode processes run."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from nopad.embedding.inputs.extras import THUMBNAIL
from nopad.embedding.inputs.reaching import retry
from nopad.pipeline.memory import Unread
from nopad.preprocessing.decode import ImageError, load_image, measure_image, unreachable_error
from nopad.preprocessing.exif import read_exif
from nopad.preprocessing.files import FileRange, open_regular, why
from nopad.preprocessing.jpegs import CheckedJpeg, check_jpeg, scaled_jpeg
from nopad.preprocessing.limits import MAX_PIXELS, NUM_FRAMES
from nopad.preprocessing.reachable import is_unreachable, missing_mount
from nopad.preprocessing.thumbnails import thumbnail
from nopad.preprocessing.video import read_frames
from nopad.preprocessing.video_file import measure_video
from nopad.storage import objects

_LARGE_BYTES = 1 << 22
MAX_FETCHED_BYTES = 1 << 24
"""A larger object is fetched once there is memory for it."""

_PROBE_BYTES = 1 << 12
_Read = TypeVar("_Read")

Media = FileRange | bytes | str
"""The place of an encoded image, its bytes, or the name of a video."""


class Video(str):
    """The name of a video.

    Attributes:
        span: the part that is read, from and to a second, one frame where these are equal; `None` for all.
        root: see `FileRange`.
        copy: keeps a local copy of a remote video while it is needed.
    """

    __slots__ = ("copy", "root", "span")
    span: tuple[float, float] | None
    root: bytes
    copy: Any

    @classmethod
    def of(cls, path: str, span: tuple[float, float] | None = None, root: bytes = b"", copy: Any = None) -> Video:
        """A video by its name."""
        video = cls(path)
        video.span, video.root, video.copy = span, root, copy
        return video

    @property
    def disk_bytes(self) -> int:
        """Bytes of its copy."""
        return 0 if self.copy is None else self.copy.num_bytes

    @property
    def is_one_frame(self) -> bool:
        """Whether one frame of it is read."""
        return self.span is not None and self.span[0] == self.span[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Video.of, (str(self), self.span, self.root)


@dataclass(frozen=True)
class MediaDecoder:
    """Decodes images, as `bytes`, and videos, by name.

    Args:
        frames: frames of a video, see `nopad.preprocessing.video.read_frames`.
        max_pixels: refuse larger images and frames.
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
        """See `Decoder.is_quick`: images are, but for very large ones; videos are not."""
        return not isinstance(media, str) and not (isinstance(media, bytes) and len(media) >= _LARGE_BYTES)

    def size(self, media: Media) -> int:
        """The bytes that `read` takes into memory; 0 where they are there, are not read, or cannot be."""
        try:
            return media.num_bytes() if isinstance(media, FileRange) else 0
        except (OSError, ValueError):
            return 0

    def read(self, media: Media) -> bytes | str:
        """The bytes of an image; a video is left where it is. What cannot be reached is tried again.

        Raises:
            UnreachableError: a file that cannot be reached.
            ImageError: one that cannot be read, or is empty.
        """
        if isinstance(media, FileRange):
            media = read_range(media)
        elif isinstance(media, Video):
            check_reachable(media)
        if not media:
            raise ImageError("file", "empty: 0 bytes")
        return media

    def measure(self, media: bytes | str) -> tuple[int, int, int]:
        """See `Decoder.measure`; a file without a readable header, or of too many pixels, fails when it is decoded."""
        if isinstance(media, bytes):
            width, height, size = measure_image(media) or (0, 0, 0)
            return (1, width * height, size) if width * height <= self.max_pixels else (1, 0, 0)
        frames = 1 if isinstance(media, Video) and media.is_one_frame else self.frames
        return measure_video(media, frames, max_pixels=self.max_pixels)

    def __call__(self, media: bytes | str) -> Tensor:
        """Decode to uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a video, of fewer frames where it has fewer.

        Raises:
            ImageError: a file that is damaged, too large, or of a format that is not read.
        """
        if isinstance(media, bytes):
            return load_image(media, max_pixels=self.max_pixels)
        if not isinstance(media, Video):
            return read_frames(media, self.frames, max_pixels=self.max_pixels)
        try:
            return self._frames(media)
        except ImageError as error:
            if not (error.__cause__ and is_unreachable(error.__cause__)):
                raise
        check_reachable(media)
        return self._frames(media)

    def _frames(self, video: Video) -> Tensor:
        frames = read_frames(str(video), self.frames, span=video.span, max_pixels=self.max_pixels)
        return frames[0] if video.is_one_frame else frames

    def scaled(
        self, media: bytes | str, min_size: Callable[[int, int], tuple[int, int]]
    ) -> tuple[Tensor, tuple[int, int]]:
        """See `Decoder.scaled`; large enough for thumbnails.

        Raises:
            ImageError: see `__call__`.
        """
        if isinstance(media, bytes):
            thumbnail_side = self.thumbnails or 0

            def min_size_with_thumbnail(height: int, width: int) -> tuple[int, int]:
                scale = min(1.0, 2 * thumbnail_side / max(height, width))
                sides = min_size(height, width)
                return max(sides[0], round(height * scale)), max(sides[1], round(width * scale))

            if (decoded := scaled_jpeg(media, min_size_with_thumbnail, max_pixels=self.max_pixels)) is not None:
                return decoded
        pixels = self(media)
        height, width = pixels.shape[-2:]
        return pixels, (height, width)

    def check_jpeg(self, media: bytes | str) -> CheckedJpeg | None:
        """See `Decoder.check_jpeg`."""
        if isinstance(media, str):
            return None
        min_side = None if self.thumbnails is None else 2 * self.thumbnails
        return check_jpeg(media, max_pixels=self.max_pixels, min_side=min_side)

    def extras(self, media: bytes | str, pixels: Tensor | None) -> dict[str, Any]:
        """See `Decoder.extras`: the columns of `nopad.embedding.inputs.extras` that were requested."""
        extras: dict[str, Any] = read_exif(media) if self.exif and isinstance(media, bytes) else {}
        if self.thumbnails is not None:
            assert pixels is not None
            extras[THUMBNAIL] = base64.b64encode(thumbnail(pixels, self.thumbnails)).decode()
        return extras


def read_range(place: FileRange) -> bytes:
    """The bytes of a range; tried again while it cannot be reached.

    Raises:
        UnreachableError: a file that cannot be reached.
        ImageError: one that cannot be read.
    """
    return _reached(place.read, place, place.timeout if place.is_remote else None)


def fetch(place: FileRange) -> bytes | Unread:
    """The bytes of an object; of a large one not yet these.

    Raises:
        UnreachableError: it cannot be reached.
        ImageError: it cannot be read, or is empty.
    """
    if place.size is not None:
        return read_range(place)

    def read() -> bytes | int:
        return objects.read(place.path, MAX_FETCHED_BYTES, place.timeout)

    data = _reached(read, place, place.timeout)
    return Unread(data, lambda: read_range(place)) if isinstance(data, int) else data


def file_size(place: FileRange) -> int:
    """Bytes of a file or an object.

    Raises:
        UnreachableError: it cannot be reached.
        ImageError: it cannot be read.
    """

    def size() -> int:
        return objects.stat(place.path, place.timeout).size if place.is_remote else os.stat(place.path).st_size

    return _reached(size, place, place.timeout if place.is_remote else None)


def check_reachable(video: Video) -> None:
    """Check that a video can be opened, and read at both ends; a file that is damaged is no error here.

    Raises:
        UnreachableError: a file that cannot be reached.
        ImageError: one that cannot be opened.
    """
    path = os.fsencode(video)

    def probe() -> None:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            for offset in (0, max(0, size - _PROBE_BYTES)):
                os.pread(file.fileno(), _PROBE_BYTES, offset)

    _reached(probe, FileRange(path, root=video.root))


def _reached(read: Callable[[], _Read], place: FileRange, timeout: float | None = None) -> _Read:
    def why_unreachable(error: BaseException) -> str:
        if is_unreachable(error):
            return why(error)
        return "" if place.is_remote else missing_mount(error, place.path, place.root)

    try:
        return retry(read, why_unreachable, timeout)
    except (OSError, ValueError) as error:
        if reason := why_unreachable(error):
            raise unreachable_error("file", reason, error) from error
        raise ImageError("file", f"cannot be read: {why(error)}") from error

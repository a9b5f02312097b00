"""The structure of image files, read without decoding: scans of a JPEG, whole animations, metadata of a PNG."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

MAX_SCANS = 100
"""Most scans of a JPEG: each costs time for the whole image, however empty it is. libtiff has the same limit."""
START_OF_SCAN = b"\xff\xda"
"""The marker that begins each scan of a JPEG."""

_MAX_STEPS = 1 << 20  # blocks and markers that are looked at, so that tiny ones without number take no time
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")  # not a stuffed byte, not a restart
_START_OF_IMAGE, _END_OF_IMAGE, _TEMPORARY = 0xD8, 0xD9, 0x01
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # not C4 and CC, tables of codes, nor C8, reserved
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def count_scans(data: bytes) -> int:
    """The scans of the first image of a JPEG file, by its markers; where those have no end, their number."""
    scans = steps = 0
    for marker in _jpeg_markers(data):
        if marker == _END_OF_IMAGE:
            break
        scans += marker == START_OF_SCAN[1]
        steps += 1
    return steps if steps == _MAX_STEPS else scans


def frame_marker(data: bytes) -> int | None:
    """The second byte of the marker that begins the frame of a JPEG, which has the coding; `None` without one."""
    ends = (START_OF_SCAN[1], _END_OF_IMAGE)
    marker = next((marker for marker in _jpeg_markers(data) if marker in _FRAMES or marker in ends), None)
    return marker if marker in _FRAMES else None


def _jpeg_markers(data: bytes) -> Iterator[int]:
    """The second bytes of the markers of a JPEG, without those in its segments."""
    position = 0
    for _ in range(_MAX_STEPS):
        match = _JPEG_MARKER.search(data, position)
        if match is None:
            return
        marker, position = match[1][0], match.end()
        yield marker
        if marker not in (_START_OF_IMAGE, _TEMPORARY):
            position += int.from_bytes(data[position : position + 2], "big")


def is_cut_short(data: bytes, format: str | None) -> bool:
    """Whether a GIF or PNG is an animation whose later frames are not whole; the decoders of others notice it."""
    return {"GIF": _is_gif_cut, "PNG": _is_apng_cut}.get(format or "", lambda _: False)(data)


def _is_gif_cut(data: bytes) -> bool:
    """Walk over the blocks of a GIF. One that ends between two of them passes, for some writers omit the end mark."""
    is_animation = is_inside = False
    images = 0
    position = 13 + _gif_colours(data[10:11])
    for _ in range(_MAX_STEPS):
        if position >= len(data):
            return (is_inside or position > len(data)) and (is_animation or images > 1)
        if is_inside:  # the data of an image or extension, in blocks of up to 255 bytes and one of none
            is_inside = data[position] > 0
            position += 1 + data[position]
        elif data[position] == ord(","):
            is_inside = True
            images += 1
            position += 11 + _gif_colours(data[position + 9 : position + 10])
        elif data[position] == ord("!"):
            is_inside = True
            is_animation = is_animation or data[position + 3 : position + 11] in (b"NETSCAPE", b"ANIMEXTS")
            position += 2
        else:
            break
    return False


def _gif_colours(flags: bytes) -> int:
    """Bytes of the colour table that a GIF's flags announce."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _is_apng_cut(data: bytes) -> bool:
    frames = expected = 0
    for kind, start, end in _png_chunks(data):
        if kind == b"acTL":
            expected = int.from_bytes(data[start : start + 4], "big")
        if kind == b"IEND":
            return False
        frames += kind == b"fcTL"
        if end >= len(data):
            return expected > 0 and (end > len(data) or frames < expected)
    return False


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk of a PNG, where its data begin, and where the chunk ends, maybe behind the file."""
    position = len(_PNG_MAGIC)
    for _ in range(_MAX_STEPS):
        if position >= len(data):
            return
        start = position + 8
        position = start + int.from_bytes(data[position : position + 4], "big") + 4
        yield data[start - 4 : start], start, position


def without_metadata(data: bytes) -> bytes | None:
    """A PNG with nothing in it but its pixels and an EXIF that is whole; `None` for any other file.

    Pillow gives a PNG up where a text, a colour profile or a checksum of something optional is out of order.
    """
    if not data.startswith(_PNG_MAGIC):
        return None
    parts = [_PNG_MAGIC]
    end = 0
    for kind, start, end in _png_chunks(data):
        is_whole_exif = (
            kind == b"eXIf" and zlib.crc32(data[start - 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]
        )
        if kind in _PNG_PIXELS or is_whole_exif:
            parts.append(data[start - 8 : end])
    return b"".join(parts) if end >= len(data) else None

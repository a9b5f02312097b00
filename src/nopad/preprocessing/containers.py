"""The structure of video files: whether a file is cut short, and whether its index claims what it cannot hold.

FFmpeg gives what it finds before the end of a file that was cut short, and allocates what an index claims before it
looks for the data. So both are checked here first, from box to box, without reading the data themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from nopad.preprocessing.file_structure import is_cut_short
from nopad.preprocessing.mp4 import File, Mp4, looks_like_mp4

_EBML = b"\x1a\x45\xdf\xa3"
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_MAX_STEPS = 1 << 20  # elements that are looked at, so that tiny ones without number take no time
_AVI_SLACK = 8  # some writers count the header in


def problem(file: File) -> str:
    """The damage of a video file in words, empty without any; unknown formats pass."""
    size = file.seek(0, 2)
    head = read_at(file, 0, 512)
    if looks_like_mp4(head):
        return Mp4(file, size).problem()
    is_cut = False
    if head.startswith(_EBML):
        is_cut = _is_matroska_cut(file, size)
    elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        is_cut = any(end > size + _AVI_SLACK for end in _riff_ends(file, size))
    elif head.startswith(b"FLV"):
        is_cut = _is_flv_cut(file, size)
    elif head.startswith(b"OggS"):
        is_cut = _is_ogg_cut(file, size)
    elif head.startswith(b"\0\0\1\xba"):
        is_cut = _is_program_stream_cut(file, size)
    elif head.startswith(_ASF_HEADER):
        is_cut = _is_asf_cut(file, size)
    elif head.startswith(b"GIF8"):
        is_cut = is_cut_short(read_at(file, 0, size), "GIF")
    elif head.startswith(b"\x89PNG"):
        is_cut = is_cut_short(read_at(file, 0, size), "PNG")
    elif step := _transport_packet(head):
        is_cut = size % step > 0
    return f"truncated: its structure goes on behind the end, byte {size}; get the file again" if is_cut else ""


def read_at(file: File, offset: int, size: int) -> bytes:
    """Bytes from an offset on, fewer at the end of the file."""
    file.seek(offset)
    return file.read(size)


def _is_matroska_cut(file: File, size: int) -> bool:
    """Walk over the elements of level 1, and over those of clusters whose size was not known when they were written.

    Sources: RFC 8794 (EBML), RFC 9559 (Matroska).
    """
    position = 0
    for _ in range(_MAX_STEPS):
        if position >= size:
            break
        head = read_at(file, position, 12)
        id_length = 9 - head[0].bit_length()
        length = 9 - head[id_length].bit_length() if len(head) > id_length else 1
        if id_length > 4 or length > 8:
            return False  # no element: FFmpeg looks for the next one
        if len(head) < id_length + length:
            return True
        payload = int.from_bytes(head[id_length : id_length + length], "big") & (1 << 7 * length) - 1
        position += id_length + length
        if payload < (1 << 7 * length) - 1:  # else unknown: its children follow
            position += payload
    return position > size


def _riff_ends(file: File, size: int) -> Iterator[int]:
    """The end of each RIFF chunk of an AVI; a chunk of size 0 was never finished and is left out."""
    position = 0
    while position + 8 <= size:
        kind, length = struct.unpack("<4sI", read_at(file, position, 8))
        if kind != b"RIFF" or not length:
            return
        position += 8 + length
        yield position
        position += length % 2


def _is_flv_cut(file: File, size: int) -> bool:
    """Adobe Flash Video File Format Specification 10.1, annex E.4."""
    position = int.from_bytes(read_at(file, 5, 4), "big") + 4
    for _ in range(_MAX_STEPS):
        if position + 11 > size:
            return position - 4 > size or 0 < size - position < 11
        tag = read_at(file, position, 4)
        if tag[0] & 0x1F not in (8, 9, 18):
            return False
        position += 11 + int.from_bytes(tag[1:], "big") + 4
    return False


def _is_ogg_cut(file: File, size: int) -> bool:
    """RFC 3533."""
    position = 0
    for _ in range(_MAX_STEPS):
        if position >= size:
            break
        head = read_at(file, position, 27 + 255)
        if not head.startswith(b"OggS"[: len(head)]):
            return False
        if len(head) < 27:
            return True
        position += 27 + head[26] + sum(head[27 : 27 + head[26]])
    return position > size


def _is_asf_cut(file: File, size: int) -> bool:
    """Advanced Systems Format specification, 3.2: the size of the file, unless it was broadcast."""
    head = read_at(file, 0, 1 << 16)
    at = head.find(_ASF_FILE_PROPERTIES)
    properties = head[at : at + 92] if at >= 0 else b""
    if len(properties) < 92:
        return False
    is_broadcast = properties[88] & 1
    return not is_broadcast and int.from_bytes(properties[40:48], "little") > size


def _is_program_stream_cut(file: File, size: int) -> bool:
    """ISO/IEC 13818-1, 2.5.3, and ISO/IEC 11172-1 for packs of MPEG-1."""
    position = 0
    for _ in range(_MAX_STEPS):
        if position >= size:
            break
        head = read_at(file, position, 14)
        if not head.startswith(b"\0\0\1"[: len(head)]) or head[3:4] < b"\xb9":
            return False
        if len(head) < 6:
            return head[3:] != b"\xb9"
        if head[3] == 0xBA:
            position += 14 + (head[-1] & 7) if head[4] >> 6 == 1 else 12
        elif head[3] == 0xB9:
            position += 4
        else:
            position += 6 + int.from_bytes(head[4:6], "big")
    return position > size


def _transport_packet(head: bytes) -> int:
    """The size of an MPEG transport stream's packets, with a time stamp before each in 192; 0 for another format."""
    for step, offset in ((188, 0), (192, 4)):
        if len(head) > offset + step and head[offset] == head[offset + step] == 0x47:
            return step
    return 0

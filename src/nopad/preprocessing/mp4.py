"""The index of an MP4 or QuickTime file: what FFmpeg would allocate for it, counted from its boxes.

Source: ISO/IEC 14496-12. How FFmpeg reads it: libavformat/mov.c, `mov_build_index`, `mov_fix_index`, `mov_read_trun`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

MAX_SAMPLES = 1 << 23
"""Most samples of all tracks: 30 hours of video and sound. FFmpeg takes about 40 bytes for each."""

MAX_BOXES = 1 << 20

File = io.FileIO | io.BytesIO

_TOP = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"pnot", b"sidx", b"mfra", b"uuid")
_NESTED = b"moov trak mdia minf stbl edts mvex moof traf udta meta tref dinf wave".split()
# Bytes before the count of a table and of each entry.
_TABLES = {b"stts": (4, 8), b"ctts": (4, 8), b"stsc": (4, 12), b"stco": (4, 4), b"co64": (4, 8), b"stss": (4, 4)}


class _UnusableIndexError(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Box:
    kind: bytes
    start: int
    end: int


@dataclass(slots=True)
class _Track:
    """Claims of a track's tables; `runs` are runs of (first chunk, samples in each)."""

    samples: int = 0
    edits: int = 0
    chunk_count: int = 0
    runs: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))
    is_sound: bool = False
    is_one_tick: bool = False

    @property
    def is_uncompressed_sound(self) -> bool:
        """Whether a sample is one value of sound, of which FFmpeg takes many together."""
        return self.is_sound and self.is_one_tick

    def index_entries(self) -> int:
        """Entries of FFmpeg's index: of uncompressed sound one for up to 1024 samples, else one for each."""
        entries = self.samples
        if self.is_uncompressed_sound:
            chunks = np.diff(np.append(self.runs[:, 0], self.chunk_count + 1)).clip(min=0)
            entries = int((chunks * -(-self.runs[:, 1] // 1024)).sum())
        return entries * max(1, self.edits)


def looks_like_mp4(head: bytes) -> bool:
    """Whether a file of these first bytes is of the MP4 family."""
    return head[4:8] in _TOP


class Mp4:
    """The boxes of a file of the MP4 family."""

    def __init__(self, file: File, size: int) -> None:
        self._file = file
        self._size = size
        self._boxes_left = MAX_BOXES

    def problem(self) -> str:
        """The reason why the file must not be read, empty without one."""
        try:
            entries = 0
            for box in self._boxes(0, self._size):
                if box.end > self._size and box.kind in _TOP:
                    kind = box.kind.decode()
                    raise _UnusableIndexError(
                        f"truncated: {kind} goes on to byte {box.end}, the file ends at {self._size}"
                    )
                if box.kind in _NESTED:
                    entries += self._entries(box)
            if entries > MAX_SAMPLES:
                raise _UnusableIndexError(f"its index claims {entries} samples, expected at most {MAX_SAMPLES}")
        except _UnusableIndexError as error:
            return f"{error}; get the file again, or write it anew: ffmpeg -i IN -c copy OUT.mp4"
        return ""

    def _boxes(self, start: int, end: int) -> Iterator[_Box]:
        """The boxes between two bytes; the last one may claim to end behind them."""
        while start + 8 <= min(end, self._size):
            self._boxes_left -= 1
            if self._boxes_left < 0:
                raise _UnusableIndexError(f"it has more than {MAX_BOXES} boxes")
            length, kind = struct.unpack(">I4s", self._read(start, 8))
            payload = start + 8
            if length == 1:
                length, payload = int.from_bytes(self._read(payload, 8), "big"), payload + 8
            box = _Box(kind, payload, start + length if length else end)
            if box.end < payload:
                return
            yield box
            start = box.end

    def _leaves(self, box: _Box) -> Iterator[_Box]:
        """The boxes at any depth inside one that hold no others, `trak` and `traf` first themselves."""
        todo = [box]
        while todo:
            box = todo.pop()
            start = box.start + 4 if box.kind == b"meta" and self._read(box.start, 4) == bytes(4) else box.start
            yield box
            if box.kind in _NESTED:
                todo += reversed(list(self._boxes(start, min(box.end, self._size))))

    def _entries(self, box: _Box) -> int:
        """Entries of FFmpeg's index for `moov` or `moof` and all tracks in it."""
        tracks = [_Track()]
        for leaf in self._leaves(box):
            if leaf.kind in (b"trak", b"traf"):
                tracks.append(_Track())
            elif leaf.kind == b"cmov":
                raise _UnusableIndexError("its index is compressed (cmov)")
            else:
                self._read_leaf(leaf, tracks[-1])
        for track in tracks:
            if track.samples > self._size and not track.is_uncompressed_sound:
                raise _UnusableIndexError(f"its index claims {track.samples} samples in a file of {self._size} bytes")
        return sum(track.index_entries() for track in tracks)

    def _read_leaf(self, box: _Box, track: _Track) -> None:
        if box.kind in (b"stsz", b"stz2"):
            size, count = struct.unpack(">II", self._read(box.start + 4, 8))
            if box.kind == b"stz2":
                self._check_table(box, 12, count * (size & 0xFF) // 8)
            elif not size:
                self._check_table(box, 12, count * 4)
            track.samples += count
        elif box.kind == b"trun":
            track.samples += self._count(box, 4)
        elif box.kind == b"elst":
            track.edits += self._count(box, 4)
        elif box.kind == b"hdlr":
            track.is_sound = track.is_sound or self._read(box.start + 8, 4) == b"soun"
        elif box.kind in _TABLES:
            self._read_table(box, track)

    def _read_table(self, box: _Box, track: _Track) -> None:
        at, width = _TABLES[box.kind]
        count = self._count(box, at)
        self._check_table(box, at + 4, count * width)
        if box.kind == b"stts":
            track.is_one_tick = count == 1 and self._read(box.start + 12, 4) == b"\0\0\0\1"
        elif box.kind == b"stsc":
            runs = np.frombuffer(self._read(box.start + 8, count * width), ">u4").reshape(-1, 3)
            track.runs = runs[:, :2].astype(np.int64)
        elif box.kind in (b"stco", b"co64"):
            track.chunk_count = count
            offsets = np.frombuffer(self._read(box.start + 8, count * width), f">u{width}")
            if count and (last := int(offsets.max())) > self._size:
                raise _UnusableIndexError(f"truncated: its data go on to byte {last}, the file ends at {self._size}")

    def _check_table(self, box: _Box, header: int, size: int) -> None:
        if box.start + header + size > min(box.end, self._size):
            kind = box.kind.decode()
            raise _UnusableIndexError(f"damaged: table {kind} claims {size} bytes, more than its box holds")

    def _count(self, box: _Box, at: int) -> int:
        return int.from_bytes(self._read(box.start + at, 4), "big")

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) < size:
            raise _UnusableIndexError(f"truncated: its index goes on behind the end, byte {self._size}")
        return data

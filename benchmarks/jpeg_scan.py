"""The CPU's part of checking a JPEG's Huffman codes on a GPU: headers to tables, many files to one buffer.

What libjpeg-turbo could complain about outside of the codes is refused here, and all that is rare; such files are left
to the check on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nopad.preprocessing.file_structure import START_OF_SCAN
from nopad.preprocessing.jpegs import MAX_DEVICE_PIXELS, jpeg_header

FIELDS = 15
"""Numbers that describe a file: its first word, its bits, its first lane, its lanes, all of its blocks, blocks of a
period, those of luma among them, and of each table of `Scan.tables` the first entry and the threshold."""

SHORT_BITS = 9
"""Codes of at most so many bits are looked up by so many, longer ones by 16."""

_END = b"\xff\xd9"
_MAX_BLOCKS = 1 << 20  # times the largest difference, 2,047, it is less than 2³¹: libjpeg-turbo refuses DC sums above
_MAX_CODES = 1 << 28  # bytes, so that positions of bits are int32
_MAX_DC_BITS, _MAX_AC_BITS = 11, 10  # of the values of 8-bit images
_REFUSED = 127
_SCAN_PARAMETERS = b"\x00\x3f\x00"  # coefficients 0 to 63, whole


@dataclass(frozen=True, slots=True)
class Scan:
    """What decoding the Huffman codes of a file needs.

    Attributes:
        codes: the entropy-coded data, without the zeros stuffed behind 0xFF.
        num_blocks: all blocks of 8 × 8 values that they have to have.
        period: after how many blocks the tables come again; an MCU, or 1 where all blocks have the same.
        num_luma: the first blocks of a period, which have the first two tables.
        tables: DC and AC of luma, then of chroma, as they are in the file: 16 counts of codes, then their symbols.
    """

    codes: bytes
    num_blocks: int
    period: int
    num_luma: int
    tables: tuple[bytes, bytes, bytes, bytes]


def read_scan(data: bytes) -> Scan | None:
    """Read the header of a file, and its codes; `None` where the CPU has to check them."""
    if jpeg_header(data, max_pixels=MAX_DEVICE_PIXELS) is None:
        return None
    header = _Header()
    at = 2
    while data[at : at + 2] != START_OF_SCAN:
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + size]
        if data[at : at + 1] != b"\xff" or len(body) != size - 2 or not header.read(data[at + 1], body):
            return None
        at += 2 + size
    start, end = at + 14, data.rfind(_END)
    if end < start or START_OF_SCAN in data[:at] or START_OF_SCAN in data[end:]:
        return None
    codes = _without_stuffing(data, start, end)
    return None if codes is None or len(codes) > _MAX_CODES else header.scan(data[at + 2 : start], codes)


def _without_stuffing(data: bytes, start: int, end: int) -> bytes | None:
    """The bytes from `start` to `end`, where a marker is; `None` if there is another between them."""
    values = np.frombuffer(data, np.uint8)
    stuffed = np.flatnonzero(values[start:end] == 0xFF) + (start + 1)
    if values[stuffed].any():
        return None
    starts = [start, *(stuffed + 1).tolist()]
    return b"".join([data[first:last] for first, last in zip(starts, [*stuffed.tolist(), end], strict=True)])


@dataclass(frozen=True, slots=True)
class LookupTable:
    """A Huffman table by the bits that come next.

    Attributes:
        entries: int32, of codes of at most `SHORT_BITS` bits by the next `SHORT_BITS`, then of longer ones by the next
            16, from `threshold` on. An entry has the bits of the code and of the value behind it (bits 0 to 4), the
            coefficients to go on by, 64 at the end of a block (bits 8 to 15), and those that the block has to have
            room for (from bit 16), more than it has for what is refused.
        threshold: the first 16 bits of the first longer code.
    """

    entries: np.ndarray
    threshold: int


def _symbol_entries(is_dc: bool) -> np.ndarray:
    """The entries of all 256 symbols, without the bits of their codes."""
    refused = (64 << 8) | (_REFUSED << 16)
    entries = np.full(256, refused, np.int32)
    for symbol in range(256):
        run, size = divmod(symbol, 16)
        if is_dc:
            if symbol <= _MAX_DC_BITS:
                entries[symbol] = symbol | (1 << 8)
        elif 0 < size <= _MAX_AC_BITS:
            entries[symbol] = size | ((run + 1) << 8) | ((run + 1) << 16)
        elif symbol == 0x00:  # the end of a block
            entries[symbol] = 64 << 8
        elif symbol == 0xF0:  # 16 zeros, and not the last ones
            entries[symbol] = (16 << 8) | (17 << 16)
    return entries


_ENTRIES = {is_dc: _symbol_entries(is_dc) for is_dc in (True, False)}
_NO_CODE = 1 | (64 << 8) | (_REFUSED << 16)


@lru_cache(maxsize=256)
def lookup_table(table: bytes, is_dc: bool) -> LookupTable | None:
    """The lookup table of a Huffman table as a file has it; `None` where libjpeg-turbo refuses it, or it is empty."""
    lengths = np.repeat(np.arange(1, 17), np.frombuffer(table[:16], np.uint8))
    spans = 1 << (16 - lengths)  # of the values of 16 bits that begin with a code; these follow each other
    end = int(spans.sum())
    symbols = np.frombuffer(table[16:], np.uint8)
    if not 0 < end < 1 << 16 or (is_dc and symbols.max() > 15):  # a code of ones alone is none
        return None
    entries = _ENTRIES[is_dc][symbols] + lengths.astype(np.int32)
    num_short = int(np.searchsorted(lengths, SHORT_BITS, "right"))
    short = np.repeat(entries[:num_short], spans[:num_short] >> (16 - SHORT_BITS))
    unused = np.full((1 << SHORT_BITS) - len(short), _NO_CODE, np.int32)
    long = np.repeat(entries[num_short:], spans[num_short:])
    no_codes = np.full((1 << 16) - end, _NO_CODE, np.int32)
    return LookupTable(np.concatenate([short, unused, long, no_codes]), len(short) << (16 - SHORT_BITS))


@dataclass(frozen=True, slots=True)
class Batch:
    """Files whose codes are checked together, on one device.

    A file's bits are cut into lanes, which are decoded side by side. The last one has at least eight bits, so that the
    bits that fill up its last byte are all in it.

    Attributes:
        data: uint8, the codes of all files, each from a multiple of four bytes on, and zeros behind them.
        tables: int32, the entries of all tables.
        files: `(N, FIELDS)` int32.
        num_lanes: all lanes.
    """

    data: Tensor
    tables: Tensor
    files: Tensor
    num_lanes: int

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        data, tables, files = (part.to(device, non_blocking=True) for part in (self.data, self.tables, self.files))
        return Batch(data, tables, files, self.num_lanes)


def pack(scans: Sequence[Scan], lane_bits: int, *, pin_memory: bool = False) -> Batch:
    """Lay out the codes and the tables of files for `jpeg_kernels.check`, in lanes of so many bits.

    Raises:
        ValueError: lanes of too few or too many bits.
    """
    if not 64 <= lane_bits <= 1 << 16:
        raise ValueError(f"lane_bits: got {lane_bits:,}, expected 64 to 65,536")
    tables: dict[tuple[bytes, bool], tuple[int, LookupTable]] = {}
    num_entries = 0
    files = torch.empty(len(scans), FIELDS, dtype=torch.int32, pin_memory=pin_memory)
    words = [len(scan.codes) // 4 + 3 for scan in scans]  # those behind the end may be read, and mean nothing
    data = torch.empty(4 * sum(words), dtype=torch.uint8, pin_memory=pin_memory)
    buffer = data.numpy()
    first_word = first_lane = 0
    for scan, size, row in zip(scans, words, files.numpy(), strict=True):
        places = []
        for table, is_dc in zip(scan.tables, (True, False, True, False), strict=True):
            if (table, is_dc) not in tables:
                lookup = lookup_table(table, is_dc)
                assert lookup is not None
                tables[table, is_dc] = num_entries, lookup
                num_entries += len(lookup.entries)
            first, lookup = tables[table, is_dc]
            places += [first, lookup.threshold]
        length, start = len(scan.codes), 4 * first_word
        buffer[start : start + length] = np.frombuffer(scan.codes, np.uint8)
        buffer[start + length : start + 4 * size] = 0
        lanes = max(1, math.ceil((8 * length - 7) / lane_bits))
        row[:] = [first_word, 8 * length, first_lane, lanes, scan.num_blocks, scan.period, scan.num_luma, *places]
        first_word, first_lane = first_word + size, first_lane + lanes
    entries = torch.from_numpy(np.concatenate([lookup.entries for _, lookup in tables.values()]))
    return Batch(data, entries.pin_memory() if pin_memory else entries, files, first_lane)


class _Header:
    """The segments of a file before its scan."""

    def __init__(self) -> None:
        self._frame = b""
        self._quantisation: set[int] = set()
        self._tables: dict[int, bytes] = {}

    def read(self, marker: int, body: bytes) -> bool:
        """Read a segment; false for one with which the file is left to the CPU."""
        match marker:
            case 0xC0 if not self._frame:
                self._frame = body
                return True
            case 0xC4:
                return self._read_huffman(body)
            case 0xDB:
                return self._read_quantisation(body)
            case 0xE0 if body.startswith(b"JFIF\x00"):
                return body[5:6] == b"\x01"  # the version
            case 0xEE if body.startswith(b"Adobe"):
                return body[11:12] == b"\x01"  # YCbCr
        return 0xE0 <= marker <= 0xEF or marker == 0xFE

    def _read_huffman(self, body: bytes) -> bool:
        while body:
            size = 17 + sum(body[1:17])
            if len(body) < size or size > 17 + 256 or body[0] & ~0x13:
                return False
            self._tables[body[0]] = body[1:size]
            body = body[size:]
        return True

    def _read_quantisation(self, body: bytes) -> bool:
        while body:
            size = 65 if body[0] < 4 else 0  # of 8 bits
            if not size or len(body) < size:
                return False
            self._quantisation.add(body[0])
            body = body[size:]
        return True

    def scan(self, body: bytes, codes: bytes) -> Scan | None:
        """The scan with the parameters of this segment."""
        frame = self._frame
        components = [frame[at : at + 3] for at in (6, 9, 12)]
        places = [body[at : at + 2] for at in (3, 5, 7)]
        names = [component[:1] for component in components]
        if len(frame) != 15 or frame[0] != 8 or frame[5] != 3 or len(set(names)) != 3:
            return None
        if body[:3] != b"\x00\x0c\x03" or body[9:] != _SCAN_PARAMETERS or [place[:1] for place in places] != names:
            return None
        sampling, *chroma = (component[1] for component in components)
        if sampling not in (0x11, 0x21, 0x22) or chroma != [0x11, 0x11] or places[1][1] != places[2][1]:
            return None
        tables = self._selected(places[0][1]) + self._selected(places[1][1])
        if None in tables or not {component[2] for component in components} <= self._quantisation:
            return None
        luma, chroma = tables[:2], tables[2:]
        across, down = sampling >> 4, sampling & 15
        height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
        period = across * down + 2
        num_blocks = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down)) * period
        if not 0 < num_blocks <= _MAX_BLOCKS:
            return None
        if luma == chroma:  # which block of the MCU a lane is at, it would not find out
            return Scan(codes, num_blocks, 1, 1, tables)  # pyright: ignore
        return Scan(codes, num_blocks, period, across * down, tables)  # pyright: ignore

    def _selected(self, selectors: int) -> tuple[bytes | None, bytes | None]:
        """The DC and the AC table of a component; `None` for one that is not there, or no Huffman code."""
        dc, ac = self._tables.get(selectors >> 4), self._tables.get(0x10 | selectors & 15)
        return (
            dc if dc is not None and lookup_table(dc, True) else None,
            ac if ac is not None and lookup_table(ac, False) else None,
        )

"""Damage: bytes, JSON values, and checksums that are mended behind it so that it is not all refused at the door."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 1023, 32767, 32768, 65535, 1 << 24, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE = (2**40, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, 1e308, 10**9, 10**30, float("nan"), float("inf"), "", "3", "NaN", "../x"),
    *("\0", "\x1b[31m", "é" * 300, "\ud800", [], {}, [1, 2], [[]], {"a": {}}, [0] * 1000),
)
_SMALL = 1 << 16


def mutate(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """One to six changes at random places; now and then none."""
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        data = random.choice(_CHANGES)(data, random, others)
    return data


def mutate_json(data: bytes, random: Random, others: Sequence[bytes] = ()) -> bytes:
    """Other values in a JSON document; half of the time other bytes."""
    if random.random() < 0.5:
        return mutate(data, random, others)
    document = json.loads(data)
    for _ in range(random.randint(1, 3)):
        document = _other_value(document, random)
    text = json.dumps(document)
    if random.random() < 0.05:
        text = "[" * 100_000 + text
    return text.encode("utf-8", "surrogatepass")


def _other_value(document: Any, random: Random) -> Any:
    holder, key = [document], 0
    node: Any = document
    while isinstance(node, dict | list) and node and random.random() < 0.9:
        holder, key = node, random.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = holder[key]
    if isinstance(holder, dict) and random.random() < 0.2:
        del holder[key]
    elif isinstance(node, int) and random.random() < 0.3:
        holder[key] = random.choice((*_NUMBERS, *_LARGE, -node, node + 1))
    else:
        holder[key] = copy.deepcopy(random.choice(_VALUES))  # later changes must not reach other cases
    return holder[0] if node is document else document


def _flip(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8, 32)) if data else 0):
        changed[_place(data, random) % len(data)] ^= random.choice((1, 2, 4, 8, 16, 32, 64, 128, 255))
    return bytes(changed)


def _number(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    format = random.choice(("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(format)
    numbers = (*_NUMBERS, len(data), *_LARGE) if size == 8 else (*_NUMBERS, len(data))
    value = (random.choice(numbers) + random.choice((0, 0, 0, -1, 1))) % (1 << 8 * size)
    at = _place(data, random)
    return data[:at] + struct.pack(format, value) + data[at + size :]


def _delete(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + _length(random) :]


def _repeat(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at = _place(data, random)
    part = data[at : at + _length(random)]
    times = random.choice((1, 2, 100, 1000))
    return data[:at] + part * min(times, _SMALL // max(1, len(part)) + 1) + data[at:]


def _fill(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at, size = _place(data, random), _length(random)
    part = random.choice((b"\0" * size, b"\xff" * size, random.randbytes(size)))
    return data[:at] + part + data[at + (size if random.random() < 0.7 else 0) :]


def _cut(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    return data[: _place(data, random)]


def _splice(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    other = random.choice(others) if others else data
    start = _place(other, random)
    at = _place(data, random)
    return data[:at] + other[start : start + _length(random)] + data[at + random.choice((0, _length(random))) :]


def _place(data: bytes, random: Random) -> int:
    """More often near the start or the end, where headers and indices are."""
    size = len(data)
    near = min(size, random.choice((32, 512)))
    return random.choice((random.randint(0, size), random.randint(0, near), size - random.randint(0, near)))


def _length(random: Random) -> int:
    return random.choice((1, 2, 4, 8, 16, 64, 512, 4096))


_CHANGES: tuple[Callable[[bytes, Random, Sequence[bytes]], bytes], ...] = (
    *(_flip, _flip, _number, _number, _number, _delete, _repeat, _fill, _cut, _splice),
)


def mend_tar(data: bytes) -> bytes:
    """Make the checksum of every block right that looks like a tar header."""
    blocks = [bytearray(data[start : start + 512]) for start in range(0, len(data), 512)]
    for block in blocks:
        if len(block) == 512 and block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
    return b"".join(blocks)


def mend_png(data: bytes) -> bytes:
    """Make the checksum of every chunk of a PNG right."""
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        parts += [data[position:end], zlib.crc32(data[position + 4 : end]).to_bytes(4, "big")]
        position = end + 4
    return b"".join((*parts, data[position:]))

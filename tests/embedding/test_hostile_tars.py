"""Headers of tars by which tarfile takes time or memory without end; and those that archivers write."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nopad.embedding.inputs.archives import MAX_HEADER_BYTES, tar_inputs
from nopad.embedding.inputs.listing import Input


def member(name: str) -> bytes:
    """The header of an empty member."""
    return tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)


def header(type: bytes, payload: bytes, size: int | None = None) -> bytes:
    """A header of attributes, and these."""
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = type, len(payload) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + payload + bytes(-len(payload) % 512)


def record(name: str, value: str) -> bytes:
    """An attribute: the number is the length of the whole."""
    text = f" {name}={value}\n".encode()
    length = len(text)
    while len(str(length)) + len(text) != length:
        length = len(str(length)) + len(text)
    return str(length).encode() + text


def old_sparse(blocks: int) -> bytes:
    """A sparse member of GNU's old format, whose map goes on for so many blocks."""
    block = bytearray(member("sparse.png"))
    block[156:157], block[257:265] = b"S", b"ustar  \0"
    block[482] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + (bytes(504) + b"\1" + bytes(7)) * blocks


SPARSE = header(b"x", record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"))
TOO_MANY = f"headers of more than {MAX_HEADER_BYTES} bytes"


def global_headers(number: int) -> Iterator[bytes]:
    for index in range(number):
        yield header(b"g", b"".join(record(f"a{index}.{key}", "x" * 20) for key in range(100)))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "4 GB of attributes": (lambda: header(b"x", record("comment", "x"), 4 << 30), TOO_MANY),
    "4 GB of global attributes": (lambda: header(b"g", record("comment", "x"), 4 << 30), TOO_MANY),
    "a name of 4 GB": (lambda: header(b"L", b"name", 4 << 30), TOO_MANY),
    "global headers in a row": (
        lambda: b"".join(header(b"g", record("comment", "x" * 60_000)) for _ in range(100)),
        TOO_MANY,
    ),
    "small global headers in a row": (lambda: header(b"g", record("a", "b")) * 1000, "hundreds of headers"),
    "global headers between members": (
        lambda: b"".join(one + member(f"{index}.txt") for index, one in enumerate(global_headers(100))),
        "its global attributes take more than 65536 bytes",
    ),
    "an old sparse map": (lambda: old_sparse(5000), TOO_MANY),
    "a sparse map without an end": (
        lambda: SPARSE + tarfile.TarInfo("s.png").tobuf() + b"9999999\n" + b"0\n" * MAX_HEADER_BYTES,
        TOO_MANY,
    ),
    "lengths that overlap": (lambda: header(b"x", b"2 " * 20_000 + b"="), "attributes that are damaged"),
    "a length of zero": (lambda: header(b"x", b"0 a=b\n"), "attributes that are damaged"),
    "a length behind the end": (lambda: header(b"x", b"99 a=b\n"), "attributes that are damaged"),
    "digits without end": (lambda: header(b"x", record("comment", "1" * 100_000)), "hundreds of digits"),
}


def listed(tmp_path: Path, data: bytes, size: int = 0) -> list[Input]:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    os.truncate(path, max(size, len(data)))
    return list(tar_inputs(str(path), str(path), Counter()))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_end_a_tar_behind_its_whole_members(tmp_path: Path, kind: str):
    make, reason = HOSTILE[kind]
    data = member("a.png") + make() + member("b.png") + bytes(1024)
    first, last = listed(tmp_path, data, size=5 << 30)
    assert (first.id, first.kind) == ("a.png", "tar")
    assert last.kind == "broken"
    assert reason in last.note


def test_headers_that_archivers_write(tmp_path: Path):
    buffer = io.BytesIO()
    comment = {"comment": "1234567890 " * 100}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers=comment) as archive:
        for number in range(3):
            info = tarfile.TarInfo("é" * 200 + f"{number}.png")
            info.pax_headers = {"SCHILY.xattr.user.a": "x" * 65_000 + "\n12 b=\n", "mtime": "1700000000.123456789"}
            archive.addfile(info)
    assert [item.kind for item in listed(tmp_path, buffer.getvalue())] == ["tar"] * 3


def test_a_name_that_looks_like_a_header_of_attributes(tmp_path: Path):
    """Its 156th letter is where the type of a header stands."""
    data = header(b"L", b"x" * 300 + b".png\0") + member("short.png") + bytes(1024)
    (only,) = listed(tmp_path, data)
    assert (only.id, only.kind) == ("x" * 300 + ".png", "tar")

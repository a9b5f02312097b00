"""Files of which many parts are read: opened once, and never an old one in place of another."""

import errno
import os
from io import FileIO
from pathlib import Path

import pytest

from nopad.preprocessing.files import open_regular
from nopad.preprocessing.open_files import AHEAD_BYTES, OpenFiles


class Opened:
    """Files, and those that were opened."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.opened: list[FileIO] = []
        self.files = OpenFiles(self._open)

    def _open(self, path: bytes) -> FileIO:
        self.names.append(os.path.basename(path).decode())
        self.opened.append(open_regular(path))
        return self.opened[-1]

    def read(self, path: Path, start: int, stop: int) -> bytes:
        return self.files.read(os.fsencode(path), start, stop)


@pytest.fixture
def opened() -> Opened:
    return Opened()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_file_is_opened_once_for_all_its_parts(opened, tmp_path):
    paths = [write(tmp_path / name, name.encode() + bytes(range(100))) for name in "ab"]
    for start in range(100):
        for path in paths:
            assert opened.read(path, start + 1, start + 3) == bytes(range(start, min(start + 2, 100)))
    assert opened.read(paths[0], 101, 104) == b""
    assert opened.names == ["a", "b"]


def test_files_that_are_not_read_any_more_are_closed(opened, tmp_path):
    for number in range(5):
        assert opened.read(write(tmp_path / f"{number}", b"abc"), 0, 3) == b"abc"
    assert [file.closed for file in opened.opened] == [True, True, True, False, False]


def test_another_file_in_its_place_is_read(opened, tmp_path):
    path = write(tmp_path / "a", b"old")
    assert opened.read(path, 0, 3) == b"old"
    path.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        opened.read(path, 0, 3)
    write(path, b"new")
    assert opened.read(path, 0, 3) == b"new"
    os.truncate(path, 1)
    assert opened.read(path, 0, 3) == b"n"
    assert opened.names == ["a", "a"]


def test_what_cannot_be_read_is_opened_anew(opened, tmp_path, monkeypatch):
    """A handle may be stale for good, where a file server has moved."""
    path = write(tmp_path / "a", b"abc")
    assert opened.read(path, 0, 1) == b"a"

    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", stale)
        with pytest.raises(OSError, match="Stale"):
            opened.read(path, 1, 2)
    assert opened.read(path, 1, 2) == b"b"
    assert opened.names == ["a", "a"]


def test_a_part_that_the_system_returns_in_pieces_is_whole(opened, tmp_path, monkeypatch):
    path, pread = write(tmp_path / "a", b"abcdefgh"), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 3), offset))
    assert opened.read(path, 0, 8) == b"abcdefgh"
    assert opened.read(path, 1, 20) == b"bcdefgh"


def test_the_system_reads_ahead_block_by_block(opened, tmp_path, monkeypatch):
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, how: advice.append((start, size, how)))
    path = write(tmp_path / "a", b"abc")
    os.truncate(path, 3 * AHEAD_BYTES)
    for start in range(0, 3 * AHEAD_BYTES, AHEAD_BYTES // 4):
        opened.read(path, start, start + 10)
    blocks = (0, AHEAD_BYTES, 2 * AHEAD_BYTES)
    assert advice == [(block, 2 * AHEAD_BYTES, os.POSIX_FADV_WILLNEED) for block in blocks]

"""Images in tars."""

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from input_samples import fill, ids, kinds, level, picture, reason, write_tar

from nopad.embedding.inputs import archives
from nopad.embedding.inputs.sources import list_inputs


def test_a_tar_gives_its_pictures(tmp_path: Path):
    long = "long/" * 60 + "name.png"
    members = [
        ("../../up.png", picture(1)),
        ("/abs.jpg", picture(2)),
        ("a.json", b"{}"),
        ("v.mp4", b"-"),
        ("b.cls", b""),
    ]
    members += [
        (long, picture(3)),
        ("new\nline.png", picture(4)),
        ("\udcff.png", picture(5)),
        ("../../up.png", picture(6)),
    ]
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "a.tar", members, format)
        before = sorted(tmp_path.rglob("*"))
        listing = list_inputs([path])
        assert ids(listing) == ["../../up.png", "/abs.jpg", long, "new\nline.png", "\\xff.png", "../../up.png"]
        assert [level(item) for item in listing.inputs] == [1, 2, 3, 4, 5, 6]
        assert {item.source for item in listing.inputs} == {str(path)}
        assert listing.left_out == {".json": 1, ".mp4": 1, ".cls": 1}
        assert sorted(tmp_path.rglob("*")) == before


def test_links_and_folders_in_a_tar_are_no_pictures(tmp_path: Path):
    fill(tmp_path / "d", "a.png")
    (tmp_path / "d/soft.png").symlink_to("a.png")
    os.link(tmp_path / "d/a.png", tmp_path / "d/hard.png")
    os.mkfifo(tmp_path / "d/pipe.png")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "d", "d")
    listing = list_inputs([tmp_path / "a.tar"])
    assert [(item.id, level(item)) for item in listing.inputs] == [("d/a.png", 0), ("d/hard.png", 0)]
    assert listing.left_out == {"folder": 1, "link": 1, "special file": 1}


def test_a_hard_link_in_a_tar_gives_the_picture_that_it_stands_for(tmp_path: Path):
    def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.LNKTYPE, target
        return info, b""

    def file(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        return info, data

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for info, data in [
            link("early.png", "a.png"),
            file("a.png", picture(1)),
            link("b.png", "./a.png"),
            file("data", picture(2)),
            link("c.png", "data"),
            file("a.png", picture(3)),  # as it is unpacked: b.png stays what it was
            link("d.png", "a.png"),
            link("e.png", "b.png"),
            link("note.txt", "data"),
        ]:
            archive.addfile(info, io.BytesIO(data))
    inputs = list_inputs([tmp_path / "a.tar"]).inputs
    assert reason(inputs[0]) == "a hard link to a.png, which is not in the tar before it"
    images = [(item.id, level(item)) for item in inputs[1:]]
    assert images == [("a.png", 1), ("b.png", 1), ("c.png", 2), ("a.png", 3), ("d.png", 3), ("e.png", 1)]


def long_name(size: int = 4) -> bytes:
    """A header that announces a long name, and the name."""
    info = tarfile.TarInfo("././@LongLink")
    info.size, info.type = size, tarfile.GNUTYPE_LONGNAME
    return info.tobuf(tarfile.GNU_FORMAT) + b"abc\0" + bytes(508)


LONG_NAMES = long_name() * 1000


def three_in_a_tar(tmp_path: Path) -> tuple[Path, bytes]:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i)) for i in range(3)], tarfile.USTAR_FORMAT)
    return path, path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "whole", "note"),
    [
        (lambda data: data[:1540], 1, "truncated: 1.png goes on to byte 16.., the file ends at 1540"),
        (lambda data: data[:1300], 1, "truncated at byte 1300: the end mark is missing"),
        (lambda data: data[:2048], 2, "truncated at byte 2048: the end mark is missing"),
        (lambda data: data[:1024] + b"x" * 512 + data[1536:], 1, "damaged: no valid header at byte 1024 of"),
        (lambda data: data * 2, 3, "there is more after its end mark at byte 3072 of 20480"),
        (lambda data: data[:3072], 3, "truncated at byte 3072: the end mark is missing"),
        (
            lambda data: data[:1024] + LONG_NAMES + data[1024:],
            1,
            "damaged at byte 1024 of .*: hundreds of headers of one",
        ),
        (
            lambda data: data[:1024] + long_name(1 << 30) + data[1024:],
            1,
            "truncated or damaged at byte 1024 .*: headers of more than 1048576 bytes",
        ),
    ],
)
def test_a_damaged_tar_gives_its_whole_members_and_one_broken_input(
    tmp_path: Path, damage: Callable[[bytes], bytes], whole: int, note: str
):
    path, data = three_in_a_tar(tmp_path)
    path.write_bytes(damage(data))
    listing = list_inputs([path])
    assert kinds(listing) == ["tar"] * whole + ["broken"]
    assert [level(item) for item in listing.inputs[:whole]] == list(range(whole))
    last = listing.inputs[-1]
    assert last.id == "a.tar"
    assert re.match(note, reason(last))


def test_a_tar_that_is_cut_after_the_listing(tmp_path: Path):
    path, data = three_in_a_tar(tmp_path)
    inputs = list_inputs([path]).inputs
    path.write_bytes(data[:1540])
    assert level(inputs[0]) == 0
    assert "the file ends at 1540" in reason(inputs[1])
    assert "the file ends at 1540" in reason(inputs[2])


def test_listing_a_tar_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = 0

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal read
            data = super().read(-1 if size is None else size)
            read += len(data)
            return data

    monkeypatch.setattr(archives, "open_source", lambda path, *_: Counting(path))
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", bytes(100_000)) for i in range(5)])
    assert len(list_inputs([path]).inputs) == 5
    assert read < 5_000

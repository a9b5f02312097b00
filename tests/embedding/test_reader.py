"""Inputs to pixels, and what becomes of those that cannot be read."""

import errno
import os
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from input_samples import fill, ids, image, level, picture, reason, refuse, write_parquet, write_tar
from PIL import Image

from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.sources import list_inputs
from nopad.preprocessing import files
from nopad.preprocessing.decode import ImageError


def test_content_tells_the_format(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(picture(300, format="PNG"))
    assert level(image(tmp_path / "a.jpg")) == 300
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert level(image(tmp_path / "a.gif")) == 0


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty: 0 bytes"),
        (b"not an image", "not an image that Pillow can read"),
        (picture(width=64, height=64, format="JPEG")[:-200], "truncated or damaged"),
        (picture(width=300, height=300, format="JPEG"), "300×300 is 90000 pixels, expected 1 to max_pixels 10000"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, expected: str):
    (tmp_path / "a.jpg").write_bytes(data)
    write_tar(tmp_path / "a.tar", [("a.jpg", data)])
    write_parquet(tmp_path / "a.parquet", {"image": [data]})
    for item in list_inputs([tmp_path / "a.jpg", tmp_path / "a.tar", tmp_path / "a.parquet"]).inputs:
        assert reason(item, max_pixels=10_000).startswith(expected)


def make_nothing(path: Path) -> None:
    pass


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (make_nothing, "No such file or directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (Path.mkdir, "expected a regular file, got a folder"),
        (os.mkfifo, "expected a regular file, got a named pipe"),
        (make_socket, "expected a regular file, got a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a regular file, got a device"),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video", "tar", "parquet"])
def test_what_is_no_file_is_an_error_and_never_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable, expected: str, kind: str
):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    Path("beside").touch()  # an empty folder may be one where nothing is mounted
    make(Path("a.mp4"))
    assert expected in reason(Input("a", "s", kind, os.fsencode(tmp_path / "a.mp4"), 0, 4, "image"))


def test_links_and_pipes_in_a_folder_are_rows(tmp_path: Path):
    fill(tmp_path, "good.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert ids(list_inputs([tmp_path])) == ["dangling.png", "good.png", "loop.png", "pipe.png"]


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, "closed.png")
    refuse(monkeypatch, "open", "closed.png")
    assert reason(image(tmp_path / "closed.png")) == "cannot be read: Permission denied"


def test_a_file_that_vanishes_after_the_listing(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [("a.png", picture())])
    write_parquet(tmp_path / "a.parquet", {"image": [picture()]})
    inputs = list_inputs([fill(tmp_path, "a.png") / "a.png", tmp_path / "a.tar", tmp_path / "a.parquet"]).inputs
    (tmp_path / "beside").touch()
    for item in inputs:
        os.remove(item.path)
        assert "No such file or directory" in reason(item)


def test_a_null_byte_in_a_listed_path(tmp_path: Path):
    (tmp_path / "a.lst").write_bytes(b"a\0b.png\na\0b.mp4\na\0b.tar\na\0b.parquet")
    fill(tmp_path, "good.png")
    for item in list_inputs([tmp_path / "a.lst", tmp_path / "good.png"]).inputs[:-1]:
        assert "embedded null" in reason(item)


def test_file_without_permission(tmp_path: Path, monkeypatch):
    """Permissions do not bind root, so that the system's answer is played."""
    (tmp_path / "a.png").touch()

    def refuse(path, flags, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert reason(image(tmp_path / "a.png")) == "cannot be read: Permission denied"


def test_huge_files_are_not_read(tmp_path: Path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(files.MAX_BYTES + 1)
    assert "expected at most 2147483648" in reason(image(tmp_path / "a.png"))


def test_a_video_gives_its_frames_and_its_errors(tmp_path: Path):
    av = pytest.importorskip("av")
    name = os.path.join(os.fsencode(tmp_path), b"\xff.mkv")
    with av.open(os.fsdecode(name), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 32, 3), 50 * i, np.uint8))))
        container.mux(stream.encode())
    (tmp_path / "text.mp4").write_bytes(b"text")
    text, video = list_inputs([tmp_path]).inputs
    assert (video.kind, video.id) == ("video", "\\xff.mkv")
    with Reader(MediaDecoder(frames=2)) as source:
        assert source.pixels(video).shape == (2, 3, 16, 32)
    assert "no video that can be read" in reason(text)
    assert "expected at most 500" in reason(video, max_pixels=500)


def test_a_reader_checks_its_arguments():
    with pytest.raises(ValueError, match="got 0 and 5"):
        MediaDecoder(frames=0, max_pixels=5)


def test_twenty_threads_read_what_one_reads(tmp_path: Path):
    fill(tmp_path / "folder", *(f"{i}.png" for i in range(20)))
    (tmp_path / "folder/bad.png").write_bytes(b"bad")
    write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(100 + i)) for i in range(60)])
    for i in range(5):  # more than stay open
        cells = [picture(200 + 20 * i + j) for j in range(20)]
        write_parquet(tmp_path / f"{i}.parquet", {"image": cells}, row_group_size=4)
    inputs = list_inputs([tmp_path / "folder", tmp_path / "a.tar", f"{tmp_path}/*.parquet"]).inputs[:]
    items = inputs * 2
    random.Random(0).shuffle(items)

    def read(item: Input) -> torch.Tensor | str:
        try:
            return source.pixels(item)
        except ImageError as error:
            return str(error)

    with Reader() as source:
        serial = [read(item) for item in items]
    with Reader() as source, ThreadPoolExecutor(20) as pool:
        parallel = list(pool.map(read, items))
    assert sum(isinstance(one, str) for one in serial) == 2
    for one, other in zip(serial, parallel, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)

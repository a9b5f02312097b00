import contextlib
import errno
import io
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nopad.embedding.inputs import archives, columns
from nopad.embedding.inputs import listing as inputs
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.names import expand_braces
from nopad.embedding.inputs.sources import Listing, list_inputs
from nopad.preprocessing import files
from nopad.preprocessing.decode import ImageError


def picture(level: int = 0, width: int = 5, height: int = 3, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level % 256, level // 256, 7)).save(buffer, format)
    return buffer.getvalue()


def level(item: Input) -> int:
    with Reader() as source:
        red, green, _ = source.pixels(item)[:, 0, 0].tolist()
    return red + 256 * green


def fill(folder: Path, *names: str) -> Path:
    """Pictures whose level is their place among the names."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(i))
    return folder


def ids(listing: Listing) -> list[str]:
    return [item.id for item in listing.inputs]


def kinds(listing: Listing) -> list[str]:
    return [item.kind for item in listing.inputs]


def reason(item: Input, **options) -> str:
    with Reader(MediaDecoder(**options)) as source, pytest.raises(ImageError) as error:
        source.pixels(item)
    assert error.value.source == item.id
    error.value.reason.encode()
    return error.value.reason


def image(path: Path | bytes) -> Input:
    return Input("a", "s", "image", os.fsencode(path))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def rows(count: int) -> list[Input]:
    return [Input(f"{i}\n", "s", "image", b"/\xff%d" % i, i, 2 * i, "é" * (i % 3)) for i in range(count)]


def test_an_input_list_gives_what_it_was_made_of():
    items = rows(10)
    inputs = InputList.of(items)
    assert (list(inputs), inputs[3], inputs[-1]) == (items, items[3], items[-1])
    assert (inputs[2:5], inputs[8:99], inputs[5:2], inputs[::-3]) == (items[2:5], items[8:], [], items[::-3])
    with pytest.raises(IndexError, match="input 10 of 10"):
        inputs[10]


def test_an_input_list_survives_its_file(tmp_path: Path):
    for items in ([], rows(10)):
        inputs = InputList.of(items)
        inputs.save(tmp_path / "inputs")
        assert list(InputList.load(tmp_path / "inputs")) == items
        assert InputList.load(tmp_path / "inputs").digest() == inputs.digest()
    write_parquet(tmp_path / "other", {"a": [1]})
    with pytest.raises(ValueError, match="expected the columns"):
        InputList.load(tmp_path / "other")


def test_no_thread_of_arrow_holds_what_python_read(tmp_path, monkeypatch):
    # It lets go of it in its own time, and ends a Python that is at its end with SIGABRT.
    InputList.of([Input("a", "b", "image", b"/a")]).save(tmp_path / "inputs")
    readers = set()

    class Watched(io.FileIO):
        def read(self, *arguments):
            readers.add(threading.get_ident())
            return super().read(*arguments)

    monkeypatch.setattr(inputs, "open", Watched, raising=False)
    assert len(InputList.load(tmp_path / "inputs")) == 1
    assert readers <= {threading.get_ident()}


def test_a_digest_tells_content_and_order_but_not_chunks():
    items = rows(10)
    inputs = InputList.of(items)
    table = inputs._table
    assert InputList(pa.concat_tables([table[:3], table[3:4], table[4:]])).digest() == inputs.digest()
    one = items[0]
    others = [
        [*items[1:], one],
        items[:-1],
        [Input(one.id, one.source, one.kind, b"/other", one.offset, one.size, one.note), *items[1:]],
        [Input(one.id, one.source, one.kind, one.path, 9, one.size, one.note), *items[1:]],
    ]
    digests = {inputs.digest(), *(InputList.of(other).digest() for other in others)}
    assert len(digests) == 5
    pair = Input("ab", "s", "image", b""), Input("c", "s", "image", b"")
    moved = Input("a", "s", "image", b""), Input("bc", "s", "image", b"")
    assert InputList.of(pair).digest() != InputList.of(moved).digest()


def test_a_folder_is_listed_in_the_order_of_its_bytes(tmp_path: Path):
    fill(tmp_path, "b/1.png", "b.png", "a.PNG", "b/é.png", "b/Z.png", "b-c/1.png")
    listing = list_inputs([tmp_path])
    assert ids(listing) == ["a.PNG", "b-c/1.png", "b.png", "b/1.png", "b/Z.png", "b/é.png"]
    assert [level(item) for item in listing.inputs] == [2, 5, 1, 0, 4, 3]
    assert {item.source for item in listing.inputs} == {str(tmp_path)}


def test_other_files_in_a_folder_are_counted(tmp_path: Path):
    fill(tmp_path, "a.png", "b.heic", "c.jxl", "d.mp4", "e.MOV", "f.json", "g.JSON", "README", "h.tar", "i.tar.gz")
    listing = list_inputs([tmp_path])
    assert kinds(listing) == ["image", "image", "image", "video", "video"]
    assert listing.left_out == {".json": 2, "": 1, ".tar": 1, ".tar.gz": 1}


def test_a_folder_of_tars_and_parquet_files_alone_gives_what_is_in_them(tmp_path: Path):
    write_parquet(tmp_path / "b.parquet", {"image": [picture(1)]})
    (tmp_path / "x").mkdir()
    write_tar(tmp_path / "x/a.tar", [("1.png", picture(2))])
    listing = list_inputs([tmp_path])
    assert [(item.kind, item.id, item.source) for item in listing.inputs] == [
        ("parquet", "0", f"{tmp_path}/b.parquet"),
        ("tar", "1.png", f"{tmp_path}/x/a.tar"),
    ]
    assert not listing.left_out


def test_links_are_followed_but_no_loop_twice(tmp_path: Path):
    fill(tmp_path / "data", "a.png", "sub/b.png")
    fill(tmp_path / "elsewhere", "c.png")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/sub/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/z.png").symlink_to(tmp_path / "elsewhere/c.png")
    assert ids(list_inputs([tmp_path / "data"])) == ["a.png", "link/c.png", "sub/b.png", "z.png"]
    recursive = ids(list_inputs([f"{tmp_path}/data/**/*.png"]))
    assert recursive == ["a.png", "link/c.png", "sub/b.png", "z.png"]


def test_names_keep_their_bytes(tmp_path: Path):
    names = [b"new\nline.png", b"not \xff\xfe utf8.png", b"a tab\t'\"\\.png"]
    for i, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(picture(i))
    for source in (tmp_path, f"{tmp_path}/*.png"):
        inputs = list_inputs([source]).inputs
        assert [item.id for item in inputs] == ["a tab\t'\"\\.png", "new\nline.png", "not \\xff\\xfe utf8.png"]
        assert [level(item) for item in inputs] == [2, 0, 1]


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, name: str) -> None:
    """The system's refusal, also for root, whom nothing is refused."""
    original = getattr(os, function)

    def refusing(path, *arguments, **options):
        if isinstance(path, str | bytes) and os.path.basename(os.fsdecode(path)) == name:
            raise PermissionError(13, "Permission denied", path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, function, refusing)


def test_a_folder_that_cannot_be_listed_stays_as_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, "a.png", "closed/b.png", "z.png")
    refuse(monkeypatch, "scandir", "closed")
    for source in (tmp_path, f"{tmp_path}/**/*.png", f"{tmp_path}/**"):
        listing = list_inputs([source])
        assert ids(listing) == ["a.png", "closed", "z.png"]
        assert reason(listing.inputs[1]) == "folder cannot be listed: Permission denied"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permissions_of_the_file_system(tmp_path: Path):
    fill(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "a.png").chmod(0)
    (tmp_path / "closed").chmod(0)
    try:
        listing = list_inputs([tmp_path, fill(tmp_path / "open", "c.png")])
        assert kinds(listing) == ["image", "broken", "image", "image"]
        assert reason(listing.inputs[0]) == "cannot be read: Permission denied"
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, "a/1.png", "a/2.jpg", "b/1.png", "b/c/3.png", "b/note.txt", "b/.hidden.png", "a[1].png", "x")
    monkeypatch.chdir(tmp_path)
    assert ids(list_inputs(["?/1.png"])) == ["a/1.png", "b/1.png"]
    assert ids(list_inputs(["b/*.png"])) == ["1.png"]
    assert ids(list_inputs([f"{tmp_path}/**/*.png"])) == ["a/1.png", "a[1].png", "b/1.png", "b/c/3.png"]
    assert ids(list_inputs(["*/c/../1.png"])) == ["b/c/../1.png"]
    assert ids(list_inputs(["b/.*"])) == [".hidden.png"]
    assert {item.source for item in list_inputs(["?/1.png"]).inputs} == {"?/1.png"}
    assert all(os.path.isabs(item.path) for item in list_inputs(["?/1.png"]).inputs)


def test_a_glob_takes_files_whatever_their_suffix_and_folders_as_folders(tmp_path: Path):
    fill(tmp_path, "p/a.png", "p/b.txt", "q.txt", "r", "s.mp4")
    write_tar(tmp_path / "t.tar", [("in.png", picture())])
    listing = list_inputs([f"{tmp_path}/*"])
    assert list(zip(ids(listing), kinds(listing), strict=True)) == [
        ("p/a.png", "image"),
        ("q.txt", "image"),
        ("r", "image"),
        ("s.mp4", "video"),
        ("in.png", "tar"),
    ]
    assert listing.left_out == {".txt": 1}
    assert ids(list_inputs([f"{tmp_path}/**"])) == ["p/a.png", "p/b.txt", "q.txt", "r", "s.mp4", "in.png"]


def test_a_path_that_exists_is_no_glob(tmp_path: Path):
    fill(tmp_path, "a[1].png", "a1.png", "[x]/y.png")
    assert [level(item) for item in list_inputs([tmp_path / "a[1].png"]).inputs] == [0]
    assert ids(list_inputs([tmp_path / "[x]"])) == ["y.png"]


def test_list_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path / "lists", "near.png", "both.png")
    here = fill(tmp_path / "here", "far.png", "both.png", "odd.name", "v.mkv")
    write_tar(here / "t.tar", [("in.png", picture(9))])
    lines = [b"near.png", b"far.png\r", b"", b"both.png", os.fsencode(here / "odd.name"), b"v.mkv", b"t.tar"]
    lines += [b"gone.png", b"gone.tar", b"\xff.png", b"near.png"]
    (tmp_path / "lists/all.lst").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    monkeypatch.chdir(here)
    listing = list_inputs(["../lists/all.lst"])
    assert ids(listing)[:6] == ["near.png", "far.png", "both.png", f"{here}/odd.name", "v.mkv", "in.png"]
    assert ids(listing)[6:] == ["gone.png", "gone.tar", "\\xff.png", "near.png"]
    inputs = listing.inputs
    assert [level(inputs[i]) for i in (0, 1, 2, 3, 5, 9)] == [0, 0, 1, 2, 9, 0]
    assert kinds(listing)[4:8] == ["video", "tar", "image", "broken"]
    assert (inputs[0].source, inputs[5].source) == ("../lists/all.lst", f"{here}/t.tar")
    assert inputs[6].path == os.fsencode(tmp_path / "lists/gone.png")
    assert reason(inputs[7]) == "cannot be read: No such file or directory"


LEFT = ["._a.png", ".thumbnails/b.png", ".trash/deep/c.png", "@eaDir/d.png", "x/#recycle/e.png", "__MACOSX/x/._f.png"]


def test_what_systems_leave_beside_pictures_is_counted(tmp_path: Path):
    fill(tmp_path / "d", "a.png", ".one.png", *LEFT)
    listing = list_inputs([tmp_path / "d"])
    assert ids(listing) == [".one.png", "a.png"]
    assert listing.left_out == {"hidden": 6}  # a folder counts once
    listing = list_inputs([tmp_path / "d"], hidden=True)
    assert sorted(ids(listing)) == sorted(["a.png", ".one.png", *LEFT])
    assert not listing.left_out
    write_tar(tmp_path / "a.tar", [(f"./{name}", picture(i)) for i, name in enumerate(["a.png", ".one.png", *LEFT])])
    listing = list_inputs([tmp_path / "a.tar"])
    assert ids(listing) == ["./a.png", "./.one.png"]
    assert listing.left_out == {"hidden": 6}
    assert len(list_inputs([tmp_path / "a.tar"], hidden=True).inputs) == 8


def test_globs_pass_over_what_systems_leave_unless_it_is_named(tmp_path: Path):
    fill(tmp_path, "a.png", *LEFT)
    listing = list_inputs([f"{tmp_path}/**/*.png"])
    assert ids(listing) == ["a.png"]
    assert listing.left_out == {"hidden": 5}
    assert ids(list_inputs([f"{tmp_path}/**/*.png"], hidden=True)) == ["@eaDir/d.png", "a.png", "x/#recycle/e.png"]
    assert ids(list_inputs([f"{tmp_path}/@eaDir/*.png"])) == ["d.png"]
    assert ids(list_inputs([f"{tmp_path}/.thumb*/*"])) == [".thumbnails/b.png"]
    assert ids(list_inputs([tmp_path / ".thumbnails"])) == ["b.png"]
    assert ids(list_inputs([tmp_path / "._a.png"])) == ["._a.png"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{00008..00011}.tar", ["00008.tar", "00009.tar", "00010.tar", "00011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{0..6..3}x", ["0x", "3x", "6x"]),
        ("{2..0}", ["2", "1", "0"]),
        ("a{b,c{1,2},}d", ["abd", "ac1d", "ac2d", "ad"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("no{brace", ["no{brace"]),
        ("{one}", ["{one}"]),
        ("{x{1,2}}", ["{x1}", "{x2}"]),
        ("}{", ["}{"]),
    ],
)
def test_braces_stand_for_words_as_in_a_shell(pattern: str, words: list[str]):
    assert list(expand_braces(pattern)) == words


def test_braces_in_a_source(tmp_path: Path):
    for i in (0, 1, 3):
        write_tar(tmp_path / f"{i:05}.tar", [("a.png", picture(i))])
    fill(tmp_path, "p/x.png", "q/y.png", "{s,t}.png")
    listing = list_inputs([f"{tmp_path}/{{00000..00003}}.tar"])
    assert kinds(listing) == ["tar", "tar", "broken", "tar"]
    assert [level(listing.inputs[i]) for i in (0, 1, 3)] == [0, 1, 3]
    assert (listing.inputs[2].id, listing.inputs[2].source) == ("00002.tar", f"{tmp_path}/00002.tar")
    assert reason(listing.inputs[2]) == "cannot be opened: No such file or directory"
    assert ids(list_inputs([f"{tmp_path}/{{p,q}}/*.png"])) == ["x.png", "y.png"]
    assert ids(list_inputs([f"{tmp_path}/{{s,t}}.png"])) == ["{s,t}.png"]  # a path that exists
    with pytest.raises(ValueError, match=r"nothing that can be read in the sources; .*7\.tar: cannot be opened"):
        list_inputs([f"{tmp_path}/{{7..9}}.tar"])
    with pytest.raises(ValueError, match="its braces make more than 100000 names"):
        list_inputs([f"{tmp_path}/{{0..99999999999}}.tar"])


def test_tables_and_tars_without_pictures_cost_the_others_nothing(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [("0.png", picture(0)), ("0.json", b"{}")])
    write_tar(tmp_path / "1.tar", [])
    write_parquet(tmp_path / "0.parquet", {"key": ["0"], "url": ["u"]})  # as img2dataset writes beside its tars
    write_parquet(tmp_path / "1.parquet", {"image": pa.array([], pa.binary())})
    (tmp_path / "0_stats.json").write_text("{}")
    (tmp_path / "all.lst").write_text("0.tar\n1.tar\n0.parquet\n1.parquet\n")
    several = [tmp_path / name for name in ("0.parquet", "0.tar", "1.parquet", "1.tar")]
    for sources in ([tmp_path], [f"{tmp_path}/*.[tp]ar*"], [tmp_path / "all.lst"], several):
        listing = list_inputs(sources)
        assert ids(listing) == ["0.png"]
        assert {key: listing.left_out[key] for key in (".tar", ".parquet")} == {".tar": 1, ".parquet": 2}
    with pytest.raises(ValueError, match=r"0\.parquet: no column of image bytes in key \(string\), url \(string\)"):
        list_inputs([tmp_path / "0.parquet", tmp_path / "1.tar"])
    with pytest.raises(ValueError, match=r"1\.tar: no picture or video in it; left out: 1 \.tar"):
        list_inputs([tmp_path / "1.tar"])


def test_a_compressed_tar_among_others_is_a_broken_input(tmp_path: Path):
    write_tar(tmp_path / "0.tar", [("0.png", picture())])
    for name in ("1.tar", "2.tar.gz"):
        with tarfile.open(tmp_path / name, "w:gz"):
            pass
    listing = list_inputs([f"{tmp_path}/*"])
    assert kinds(listing) == ["tar", "broken", "broken"]
    for item in listing.inputs[1:]:
        assert "a compressed tar has no random access: decompress it" in reason(item)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[str]:
    """The relative path of a picture below 1,100 folders, one in the other."""
    here = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(1100):
        os.mkdir("d")
        os.chdir("d")
    Path("deep.png").write_bytes(picture())
    os.chdir(here)
    yield "d/" * 1100 + "deep.png"
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # pytest removes folders by recursion


def test_folders_of_any_depth(tmp_path: Path, deep: str):
    fill(tmp_path, "a.png")
    for source in (tmp_path, f"{tmp_path}/**/*.png", f"{tmp_path}/**"):
        assert ids(list_inputs([source])) == ["a.png", deep]


def test_sources_keep_their_order_and_repetitions(tmp_path: Path):
    fill(tmp_path, "b.png", "a.png")
    listing = list_inputs([tmp_path / "b.png", tmp_path, tmp_path / "b.png"])
    assert ids(listing) == ["b.png", "a.png", "b.png", "b.png"]
    assert [item.source for item in listing.inputs][::3] == [f"{tmp_path}/b.png"] * 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone", "gone: cannot be opened: No such file"),
        ("gone*", "matches nothing"),
        ("gone/*/x", "matches nothing"),
        ("texts/a.md/*", "matches nothing"),
        ("texts", "no picture or video in it; left out: 2 .md, 1 without suffix"),
        ("empty", "no picture or video in it$"),
        ("empty.lst", "no picture or video in it$"),
        ("zipped", "left out: 1 .tar.gz; compressed tars must be decompressed first"),
        ("x.tar.gz", "a compressed tar has no random access"),
        ("really.tar", "a compressed tar has no random access"),
        ("cut.tar", "nothing that can be read in the sources; .*cut.tar, cut.tar: truncated"),
        ("loop.png", "loop.png: cannot be opened: Too many levels"),
    ],
)
def test_a_source_without_anything_to_read_is_an_error(tmp_path: Path, source: str, message: str):
    fill(tmp_path, "texts/a.md", "texts/b.md", "texts/c", "zipped/a.tar.gz", "x.tar.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.lst").write_text("\n \n")
    (tmp_path / "cut.tar").write_bytes(b"abc")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with tarfile.open(tmp_path / "really.tar", "w:gz") as archive:
        archive.add(tmp_path / "texts")
    with pytest.raises(ValueError, match=message):
        list_inputs([fill(tmp_path / "good", "a.png") if "cut" not in source else tmp_path / source, tmp_path / source])


def test_no_sources_are_an_error():
    for sources in ([], "folder"):
        with pytest.raises(ValueError, match="sources: expected a list"):
            list_inputs(sources)


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
        (b"not a picture", "not an image that Pillow can read"),
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
    pictures = [(item.id, level(item)) for item in inputs[1:]]
    assert pictures == [("a.png", 1), ("b.png", 1), ("c.png", 2), ("a.png", 3), ("d.png", 3), ("e.png", 1)]


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

    monkeypatch.setattr(archives, "open_regular", lambda path: Counting(path))
    path = write_tar(tmp_path / "a.tar", [(f"{i}.png", bytes(100_000)) for i in range(5)])
    assert len(list_inputs([path]).inputs) == 5
    assert read < 5_000


@pytest.mark.parametrize(
    "type",
    [
        *(pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())),
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    ],
)
def test_parquet_rows(tmp_path: Path, type: pa.DataType):
    values = [picture(i) for i in range(7)]
    column = pa.array([{"bytes": v, "path": None} for v in values] if pa.types.is_struct(type) else values, type)
    path = write_parquet(tmp_path / "a.parquet", {"label": range(7), "photo": column}, row_group_size=3)
    inputs = list_inputs([path]).inputs
    assert [(item.id, item.kind, item.note) for item in inputs[5:]] == [
        ("5", "parquet", "photo"),
        ("6", "parquet", "photo"),
    ]
    with Reader() as source:
        assert [source.pixels(inputs[i])[0, 0, 0].item() for i in (6, 0, 3, 1, 5, 2, 4)] == [6, 0, 3, 1, 5, 2, 4]


def test_the_image_column(tmp_path: Path):
    data = [picture()]
    path = tmp_path / "a.parquet"
    chosen = [({"x": data, "n": [1]}, None, "x"), ({"mask": data, "jpg": data}, None, "jpg")]
    chosen += [({"mask": data, "jpg": data}, "mask", "mask")]
    for table, wanted, expected in chosen:
        write_parquet(path, table)
        assert list_inputs([path], image_column=wanted).inputs[0].note == expected
    refused = [
        ({"n": [1], "s": ["x"]}, None, r"no column of image bytes in n \(int64\), s \(string\)"),
        ({"x": data, "y": data}, None, r"2 columns of bytes in x \(binary\), y \(binary\); .*--image-column"),
        ({"img": data, "png": data}, None, "2 columns of bytes"),
        ({"img": data, "n": [1]}, "n", "--image-column n is no column of image bytes"),
        ({"img": data}, "gone", "--image-column gone is no column"),
    ]
    for table, wanted, message in refused:
        write_parquet(path, table)
        with pytest.raises(ValueError, match=message):
            list_inputs([path], image_column=wanted)


def test_values_without_bytes(tmp_path: Path):
    fill(tmp_path, "near.png", "far.png")
    value = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [None, {"bytes": None, "path": None}, {"path": "near.png"}, {"path": str(tmp_path / "far.png")}]
    column = pa.array([*cells, {"path": "gone.png"}], value)
    inputs = list_inputs([write_parquet(tmp_path / "a.parquet", {"image": column})]).inputs
    assert [reason(inputs[i]) for i in (0, 1)] == ["null in column 'image'"] * 2
    assert [level(inputs[i]) for i in (2, 3)] == [0, 1]
    assert reason(inputs[4]) == "cannot be read: No such file or directory"


def test_paths_in_a_table_lead_nowhere_but_below_its_folder_unless_they_are_allowed(tmp_path: Path):
    fill(tmp_path, "t/in/a.png", "secret.png", "t2/b.png")
    names = [
        "in/a.png",
        "in/../in/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "in/../../t2/b.png",
        "../t2/b.png",
    ]
    column = pa.array([{"path": name} for name in names], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    inputs = list_inputs([write_parquet(tmp_path / "t/a.parquet", {"image": column})]).inputs
    assert [level(item) for item in inputs[:2]] == [0, 0]
    for item, name in zip(inputs[2:], names[2:], strict=True):
        assert reason(item) == f"its path {name} leads out of the table's folder; --allow-outside-paths takes it"
    with Reader(allow_outside_paths=True) as source:
        assert [source.pixels(item)[0, 0, 0].item() for item in inputs] == [0, 0, 1, 1, 2, 2]


def test_a_large_row_group_is_read_in_parts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(columns, "_BLOCK_BYTES", 4000)
    values = [picture(i) + random.Random(i).randbytes(1000) for i in range(40)]
    path = write_parquet(tmp_path / "a.parquet", {"image": values}, compression="none")
    inputs = list_inputs([path]).inputs
    reads = []
    forward = columns.ParquetColumn._forward
    monkeypatch.setattr(columns.ParquetColumn, "_forward", lambda self, row: reads.append(row) or forward(self, row))
    with Reader() as source:
        assert [source.pixels(item)[0, 0, 0].item() for item in inputs] == list(range(40))
        assert 10 <= len(reads) <= 20
        assert source.pixels(inputs[0])[0, 0, 0].item() == 0  # long dropped
        assert sum(map(len, source._columns[inputs[0].path, "image"]._blocks.values())) <= 12


def test_damaged_parquet_files(tmp_path: Path):
    good = write_parquet(tmp_path / "a.parquet", {"image": [picture(), picture()]}, compression="none")
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "c.parquet").write_bytes(b"")
    listing = list_inputs([f"{tmp_path}/*.parquet"])
    assert kinds(listing) == ["parquet"] * 2 + ["broken"] * 2
    assert "no Parquet file, or damaged" in reason(listing.inputs[2])
    data = bytearray(good.read_bytes())
    data[4:60] = b"\xff" * 56
    good.write_bytes(data)
    for item in listing.inputs[:2]:
        assert "row" in reason(item)


def footer_with(path: Path, old: bytes, new: bytes) -> Path:
    """A Parquet file with other bytes in its footer."""
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    assert footer.count(old) == 1
    footer = footer.replace(old, new)
    path.write_bytes(data[: -8 - length] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return path


def varint(number: int) -> bytes:
    """A number as Thrift's compact protocol writes it, in zigzag."""
    number *= 2
    result = b""
    while number > 127:
        result += bytes([number & 127 | 128])
        number >>= 7
    return result + bytes([number])


NUM_ROWS, LIST = b"\x16", b"\x19"  # a field of 64 bits, then one that is a list: the row groups


@pytest.mark.parametrize("claimed", [2, 7, 10**15])
def test_the_row_groups_of_a_parquet_file_count(tmp_path: Path, claimed: int):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(5)]})
    footer_with(path, NUM_ROWS + varint(5) + LIST, NUM_ROWS + varint(claimed) + LIST)
    inputs = list_inputs([path]).inputs
    assert [level(item) for item in inputs[:5]] == [0, 1, 2, 3, 4]
    expected = f"damaged: its footer says {claimed:,} rows, its row groups 5, which are read; get the file again"
    assert [reason(item) for item in inputs[5:]] == [expected]


def test_row_groups_that_claim_more_than_the_file_can_hold(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(77)]})
    end = b"\x16" + varint(77) + b"\x26"  # of the row group
    footer_with(path, end, end.replace(varint(77), varint(10**15)))
    listing = list_inputs([path, fill(tmp_path / "d", "a.png")])
    assert kinds(listing) == ["broken", "image"]
    assert "its row groups claim 1,000,000,000,000,000 rows in" in reason(listing.inputs[0])


def test_a_row_group_that_ends_early_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture(i) for i in range(77)]})
    end = b"\x16" + varint(77) + b"\x26"
    footer_with(path, end, end.replace(varint(77), varint(600)))
    inputs = list_inputs([path]).inputs
    assert kinds(list_inputs([path]))[-1] == "broken"
    opened = []
    forward = columns.ParquetColumn._forward
    monkeypatch.setattr(columns.ParquetColumn, "_forward", lambda self, row: opened.append(row) or forward(self, row))
    with Reader() as source:
        assert source.pixels(inputs[76])[0, 0, 0].item() == 76
        for row in range(80, 480):
            with pytest.raises(ImageError, match="cannot be read, damaged"):
                source.pixels(inputs[row])
    assert len(opened) <= 3


def test_a_page_that_claims_gigabytes_takes_none(tmp_path: Path):
    cells = [picture(i) + random.Random(i).randbytes(5000) for i in range(4)]
    path = write_parquet(tmp_path / "a.parquet", {"image": cells}, row_group_size=2)
    data = bytearray(path.read_bytes())
    assert data[4:7] == b"\x15\x04\x15"  # a dictionary page, then its sizes, uncompressed and compressed
    at = data.index(b"\x15", 7) + 1
    end = next(place for place in range(at, at + 5) if data[place] < 128) + 1
    claim = varint((1 << 30) - 1)
    del data[at + 2000 : at + 2000 + len(claim) - (end - at)]  # of the page itself, so that what follows stays in place
    data[at:end] = claim
    path.write_bytes(data)
    inputs = list_inputs([path]).inputs
    pool = pa.default_memory_pool()
    before = pool.max_memory() or 0
    with Reader() as source:
        for item in inputs[:2]:
            with pytest.raises(ImageError, match=r"row . cannot be read, damaged\? \(.*1073741823"):
                source.pixels(item)
        assert [source.pixels(item)[0, 0, 0].item() for item in inputs[2:]] == [2, 3]
    assert (pool.max_memory() or 0) < before + (256 << 20)


def test_a_parquet_file_that_shrinks_after_the_listing(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"image": [picture()] * 3})
    last = list_inputs([path]).inputs[2]
    write_parquet(path, {"image": [picture()]})
    assert "row 2 of 1" in reason(last)
    write_parquet(path, {"other": [picture()] * 3})
    assert "row 2 cannot be read" in reason(last)


def test_saved_datasets(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def make(start: int):
        cells = [{"bytes": picture(start + i), "path": None} for i in range(3)]
        return datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]}, features=features)

    make(0).select([2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": make(10), "test": make(20)}).save_to_disk(tmp_path / "two")
    listing = list_inputs([tmp_path / "one", tmp_path / "two"])
    assert ids(listing) == ["0", "1", "train/0", "train/1", "train/2", "test/0", "test/1", "test/2"]
    assert set(kinds(listing)) == {"dataset"}
    assert [item.source for item in listing.inputs][::4] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert [level(item) for item in listing.inputs] == [2, 0, 10, 11, 12, 20, 21, 22]
    with pytest.raises(ValueError, match="--image-column label is no column"):
        list_inputs([tmp_path / "one"], image_column="label")


def test_a_dataset_of_plain_bytes_and_of_paths(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    fill(tmp_path, "far.png", "near.png")
    datasets.Dataset.from_dict({"jpg": [picture(5), None, b"x"]}).save_to_disk(tmp_path / "plain")
    inputs = list_inputs([tmp_path / "plain"]).inputs
    assert level(inputs[0]) == 5
    assert reason(inputs[1]) == "null in column 'jpg'"
    assert "not an image" in reason(inputs[2])
    cells = [{"bytes": None, "path": str(tmp_path / "near.png")}, {"bytes": None, "path": "gone.png"}]
    table = pa.table({"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
    datasets.Dataset(table).save_to_disk(tmp_path / "paths")
    inputs = list_inputs([tmp_path / "paths"]).inputs
    assert "leads out of the table's folder" in reason(inputs[0])
    with Reader(allow_outside_paths=True) as source:
        assert source.pixels(inputs[0])[0, 0, 0].item() == 1
    assert reason(inputs[1]) == "cannot be read: No such file or directory"


def test_a_damaged_dataset_is_a_broken_input(tmp_path: Path):
    pytest.importorskip("datasets")
    fill(tmp_path, "a.png")
    (tmp_path / "d").mkdir()
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / "d" / name).write_text("{")
    listing = list_inputs([tmp_path / "a.png", tmp_path / "d"])
    assert kinds(listing) == ["image", "broken"]
    assert reason(listing.inputs[1]).startswith("no dataset that can be loaded")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The Arrow file of a saved dataset: 60 pictures in batches of 20."""
    datasets = pytest.importorskip("datasets")
    table = pa.table({"label": range(60), "image": [picture(i) + bytes(500) for i in range(60)]})
    data = datasets.Dataset(table)
    data.save_to_disk(tmp_path / "d", num_shards=1)
    (path,) = (tmp_path / "d").glob("*.arrow")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    return path


def test_a_dataset_that_is_cut_short_gives_its_whole_batches(saved: Path):
    os.truncate(saved, saved.stat().st_size * 5 // 6)
    inputs = list_inputs([saved.parent]).inputs
    assert [level(item) for item in inputs[:-1]] == list(range(40))
    assert "truncated: a batch goes on to byte" in reason(inputs[-1])


def test_a_dataset_that_is_cut_short_while_it_is_read(saved: Path):
    inputs = list_inputs([saved.parent]).inputs
    with Reader() as source:
        assert source.pixels(inputs[0])[0, 0, 0].item() == 0
        os.truncate(saved, saved.stat().st_size // 2)  # a mapped file would end the process here
        for row in (1, 30, 59):
            expected = pytest.raises(ImageError, match="truncated") if row != 1 else contextlib.nullcontext()
            with expected:
                source.pixels(inputs[row])


def test_a_dataset_is_read_without_the_package(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert [level(item) for item in list_inputs([saved.parent]).inputs[58:]] == [58, 59]


def test_batches_with_dictionaries(tmp_path: Path, saved: Path):
    image = pa.array([picture(i % 3) for i in range(60)]).dictionary_encode()
    table = pa.table({"image": image})
    with pa.OSFile(str(saved), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=25)
    assert [level(item) for item in list_inputs([saved.parent]).inputs] == [i % 3 for i in range(60)]


def test_damaged_arrow_files_are_rows(saved: Path):
    whole = saved.read_bytes()
    rng = random.Random(0)
    failed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            data[rng.choice([rng.randrange(len(data)), rng.randrange(700)])] = rng.randrange(256)
        saved.write_bytes(data)
        try:
            inputs = list_inputs([saved.parent]).inputs[:]
        except ValueError:
            continue
        with Reader() as source:
            for item in inputs[::7]:
                try:
                    assert source.pixels(item).dtype == torch.uint8
                except ImageError:
                    failed += 1
    assert failed > 0


@pytest.mark.parametrize("name", ["../d2/x.arrow", "/etc/passwd", "..", ""])
def test_a_dataset_names_no_files_elsewhere(saved: Path, name: str):
    (saved.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    fill(saved.parent.parent, "a.png")
    listing = list_inputs([saved.parent.parent / "a.png", saved.parent])
    assert "expected the name of a file or folder in it" in reason(listing.inputs[1])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"[" * 100_000, "expected JSON, got maximum recursion depth"),
        (b"{" + b" " * (16 << 20), "expected at most 16777216 bytes of JSON"),
        (b'{"_data_files": [{"filename": "a.arrow"}, {"filename": "a.arrow"}]}', "2 names, of which 1 differ"),
        (b'{"_data_files": [5]}', "not subscriptable"),
        (b'{"_data_files": null}', "not iterable"),
        (b"{}", "_data_files"),
    ],
)
def test_a_dataset_whose_list_of_files_is_hostile(saved: Path, state: bytes, message: str):
    (saved.parent / "state.json").write_bytes(state)
    fill(saved.parent.parent, "a.png")
    listing = list_inputs([saved.parent.parent / "a.png", saved.parent])
    assert kinds(listing) == ["image", "broken"]
    assert message in reason(listing.inputs[1])


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
    text, film = list_inputs([tmp_path]).inputs
    assert (film.kind, film.id) == ("video", "\\xff.mkv")
    with Reader(MediaDecoder(frames=2)) as source:
        assert source.pixels(film).shape == (2, 3, 16, 32)
    assert "no video that can be read" in reason(text)
    assert "expected at most 500" in reason(film, max_pixels=500)


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

"""Folders, globs, lists of files and braces: which inputs a source gives."""

import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from input_samples import fill, ids, kinds, level, picture, reason, refuse, write_parquet, write_tar

from nopad.embedding.inputs.names import expand_braces
from nopad.embedding.inputs.sources import list_inputs


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


@pytest.mark.parametrize(("second", "is_said"), [("a", True), ("./a/", True), ("a/1.png", False), ("b", False)])
def test_a_source_that_is_given_twice_is_logged(tmp_path, monkeypatch, caplog, second, is_said):
    fill(tmp_path, "a/1.png", "b/1.png")
    monkeypatch.chdir(tmp_path)
    assert len(list_inputs(["a", second]).inputs) == 2
    assert (f"{tmp_path}/a is given more than once" in caplog.text) is is_said


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


def test_a_list_file_without_lines_is_not_read_into_memory(tmp_path: Path):
    fill(tmp_path, "a.png")
    (tmp_path / "all.txt").write_bytes(b"a.png\n" + b" " * (1 << 17) + b"\na.png\n")
    with open(tmp_path / "all.txt", "ab") as file:
        file.truncate(1 << 40)  # of zeros, which take no space
    listing = list_inputs([tmp_path / "all.txt"])
    assert kinds(listing) == ["image", "image", "broken"]
    assert "has more than 65536 bytes, expected a path; what follows is not read" in reason(listing.inputs[2])


LEFT = ["._a.png", ".thumbnails/b.png", ".trash/deep/c.png", "@eaDir/d.png", "x/#recycle/e.png", "__MACOSX/x/._f.png"]


def test_what_systems_leave_beside_images_is_counted(tmp_path: Path):
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


def test_tables_and_tars_without_images_cost_the_others_nothing(tmp_path: Path):
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
    with pytest.raises(ValueError, match=r"1\.tar: no image or video in it; left out: 1 \.tar"):
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
    """The relative path of an image below 1,100 folders, one in the other."""
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
        ("texts", "no image or video in it; left out: 2 .md, 1 without suffix"),
        ("empty", "no image or video in it$"),
        ("empty.lst", "no image or video in it$"),
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

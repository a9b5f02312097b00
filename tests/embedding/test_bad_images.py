"""Every kind of bad or odd image in one job, run by the command line: what becomes of each."""

import contextlib
import errno
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pictures import noise
from PIL import Image

import nopad
from nopad.cli import main
from nopad.embedding import table_run

MAX_PIXELS = 50_000
RGB = noise(0, 24, 20)
GREY = RGB[:, :, 0]


def saved(pixels, format: str = "PNG", **options) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, colour: int, depth: int, lines: bytes) -> bytes:
    """A PNG by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def palette_image() -> tuple[Image.Image, np.ndarray]:
    colours = noise(1, 1, 256)[0]
    image = Image.fromarray(GREY, "L").convert("P")
    image.putdata(GREY.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    return image, colours[GREY]


def rgb16() -> bytes:
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.uint16) * 257)
    return png(20, 24, 2, 16, lines)


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(byte ^ 0xFF for byte in data[place : place + 40]) + data[place + 40 :]


def animation(format: str) -> bytes:
    first, second = Image.fromarray(RGB), Image.fromarray(255 - RGB)
    options = {"lossless": True} if format == "WEBP" else {}
    return saved(first, format, save_all=True, append_images=[second], duration=50, **options)


PALETTE, PALETTE_RGB = palette_image()
JPEG = saved(RGB, "JPEG", quality=95)
PHONE = saved(RGB, "JPEG", quality=95, exif=turned(6))
CMYK = saved(Image.fromarray(noise(2, 24, 80).reshape(24, 60, 4)[:, :20].copy(), "CMYK"), "JPEG", quality=95)
HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(200)
LINE = noise(3, 1, 20000)

# The pixels whose features each file must have, or the reason that its row must give.
TABLE: dict[bytes, tuple[bytes, np.ndarray | str]] = {
    # damaged
    b"truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated or damaged (OSError: image file is truncated"),
    b"truncated.png": (saved(RGB)[:600], "truncated or damaged (OSError: "),
    b"truncated progressive.jpg": (saved(RGB, "JPEG", progressive=True)[:-60], "truncated or damaged (OSError: "),
    b"header alone.jpg": (JPEG[:20], "not an image that Pillow can read"),
    b"damaged.png": (damaged(saved(RGB), 300), "truncated or damaged"),
    b"zero bytes.jpg": (b"", "empty: 0 bytes"),
    b"postscript.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{ } loop\n",
        "not an image that Pillow can read",
    ),
    b"text.jpg": (b"not an image\n", "not an image that Pillow can read"),
    b"page.png": (b"<!DOCTYPE html><title>404</title>", "not an image that Pillow can read"),
    b"lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "not an image that Pillow can read"),
    b"noise.webp": (noise(4, 10, 10).tobytes(), "not an image that Pillow can read"),
    b"photo.heic": (HEIC, "truncated or damaged" if find_spec("pillow_heif") else "pip install '.[heic]'"),
    b"photo.jxl": (b"\xff\x0a" + bytes(100), "JPEG XL is not read; convert it to PNG or JPEG"),
    # wrong extension
    b"png.jpg": (saved(RGB), RGB),
    b"gif.png": (saved(PALETTE, "GIF"), PALETTE_RGB),
    b"upper.PNG": (saved(RGB), RGB),
    # size
    b"bomb.png": (saved(np.zeros((400, 400), np.uint8)), "400×400 is 160000 pixels, expected 1 to max_pixels 50000"),
    b"liar.png": (png(60000, 60000, 2, 8, bytes(99)), "is 3600000000 pixels, expected 1 to max_pixels 50000"),
    b"no pixels.gif": (b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;", "not an image that Pillow can read"),
    b"1x1.png": (saved(RGB[:1, :1]), RGB[:1, :1]),
    b"1x20000.png": (saved(LINE.transpose(1, 0, 2).copy()), LINE.transpose(1, 0, 2)),
    b"20000x1.png": (saved(LINE), LINE),
    # colour
    b"grey.jpg": (saved(GREY, "JPEG"), decoded(saved(GREY, "JPEG"))),
    b"16 bit grey.png": (saved(GREY.astype(np.uint16) * 257), np.repeat(GREY[:, :, None], 3, axis=2)),
    b"16 bit.png": (rgb16(), RGB),
    b"bilevel.png": (
        saved(Image.fromarray(GREY > 127)),
        np.repeat((GREY > 127)[:, :, None] * np.uint8(255), 3, axis=2),
    ),
    b"float.tif": (saved(GREY.astype(np.float32), "TIFF"), "float pixels (mode F) have no known range"),
    b"palette.png": (saved(PALETTE), PALETTE_RGB),
    b"palette transparent.png": (
        saved(PALETTE, transparency=int(GREY[0, 0])),
        np.where((GREY[0, 0] == GREY)[:, :, None], np.uint8(255), PALETTE_RGB),
    ),
    b"cmyk.jpg": (CMYK, decoded(CMYK)),
    b"alpha 0.png": (saved(np.dstack([RGB, np.zeros_like(GREY)])), RGB),
    b"alpha.png": (saved(np.dstack([RGB, GREY // 128 * 255])), np.where(GREY[:, :, None] > 127, RGB, np.uint8(255))),
    b"alpha 255.webp": (saved(np.dstack([RGB, np.full_like(GREY, 255)]), "WEBP", lossless=True), RGB),
    # frames and orientation
    b"animated.gif": (saved(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), PALETTE_RGB),
    b"animated.webp": (animation("WEBP"), RGB),
    b"animated.png": (animation("PNG"), RGB),
    b"phone.jpg": (PHONE, np.rot90(decoded(JPEG), -1)),
    b"rotated.png": (saved(RGB, exif=turned(8)), np.rot90(RGB)),
    b"mirrored.png": (saved(RGB, exif=turned(2)), RGB[:, ::-1]),
    # names
    b"new\nline.png": (saved(RGB), RGB),
    b"\xff\xfe.png": (saved(RGB), RGB),
    "naïve ☃ 'quoted' \"twice\" *.png".encode(): (saved(RGB), RGB),
    b".hidden.png": (saved(RGB), RGB),
    b"below/deep/down.png": (saved(RGB), RGB),
    # made below
    b"vanished.png": (saved(RGB), "cannot be read: No such file or directory"),
}
MADE = {
    "dangling.png": "cannot be read: No such file or directory",
    "loop.png": "cannot be read: Too many levels of symbolic links",
    "pipe.png": "cannot be read: expected a regular file, got a named pipe",
    "locked": "folder cannot be listed: Permission denied",
}
TAR = {"../evil.png": RGB, "/absolute.png": RGB, "a/../../b.png": RGB, "plain.png": "empty: 0 bytes"}


def name_of(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


EXPECTED = {name_of(name): expected for name, (_, expected) in TABLE.items()} | MADE
EXPECTED |= {f"tar {name}": expected for name, expected in TAR.items()}
SMALL = {"1x1.png": "1×1 pixels", "1x20000.png": "20000×1 pixels", "20000x1.png": "1×20000 pixels"}
"""What `"native"` refuses, and models that resize do not."""


def write_sources(folder: Path) -> list[str]:
    for name, (data, _) in TABLE.items():
        path = os.path.join(os.fsencode(folder / "photos"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
    photos = folder / "photos"
    (photos / "dangling.png").symlink_to("nothing.png")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "below" / "around").symlink_to(photos)
    (photos / "locked").mkdir()
    os.mkfifo(photos / "pipe.png")
    with tarfile.open(folder / "some.tar", "w") as archive:
        for name, expected in TAR.items():
            member = tarfile.TarInfo(name)
            data = b"" if isinstance(expected, str) else saved(expected)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return [str(photos), str(folder / "some.tar")]


@contextlib.contextmanager
def a_hostile_system(folder: Path):
    """Permissions do not bind root, so that the system's answer is played; a file goes once it is listed."""

    def refusing(real: Callable, name: str) -> Callable:
        def call(path=".", *arguments, **options):
            if os.path.basename(os.fsencode(path)) == name.encode():
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *arguments, **options)

        return call

    def list_inputs(*arguments, **options):
        listing = real(*arguments, **options)
        (folder / "photos" / "vanished.png").unlink()
        return listing

    real = table_run.list_inputs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refusing(os.scandir, "locked"))
        patch.setattr(table_run, "list_inputs", list_inputs)
        yield


@pytest.fixture(scope="module", params=["native", "crop"])
def done(request, tmp_path_factory, model, clip_model):
    """The rows by name, what is expected of each, the summary, the encoder and its options, and the folder."""
    checkpoint, limit = {"native": (model, 64), "crop": (clip_model, None)}[request.param]
    folder = tmp_path_factory.mktemp("bad")
    sources = write_sources(folder)
    arguments = ["embed", *sources, "--model", str(checkpoint), "--out", str(folder / "out"), "--json"]
    arguments += [
        "--max-pixels",
        str(MAX_PIXELS),
        "--shard-size",
        "20",
        "--capacity",
        "1",
        "--workers",
        "2",
        "--no-compile",
    ]
    arguments += ["--max-patches", str(limit)] if limit else []
    with a_hostile_system(folder), contextlib.redirect_stdout(io.StringIO()) as stdout:
        assert main(arguments) == 0
    table = [row for path in sorted((folder / "out").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    rows = {("tar " if row["source"].endswith(".tar") else "") + row["id"]: row for row in table}
    assert len(rows) == len(table)
    small = SMALL if request.param == "native" else {}
    expected = EXPECTED | {name: f"{size} (height×width), smaller than a patch" for name, size in small.items()}
    summary, options = json.loads(stdout.getvalue()), {"max_patches": limit, "capacity": 1}
    return rows, expected, summary, nopad.load(checkpoint), options, folder


@pytest.mark.parametrize("name", EXPECTED)
def test_what_becomes_of_it(done, name):
    rows, all_expected, _, encoder, options, _ = done
    row, expected = rows[name], all_expected[name]
    if isinstance(expected, str):
        assert row["status"] == "failed"
        assert expected in row["error"]
        assert row["embedding"] is row["width"] is row["grid_t"] is None
    else:
        assert (row["status"], row["error"]) == ("ok", None)
        assert (row["height"], row["width"]) == expected.shape[:2]
        vector = encoder.embed([np.ascontiguousarray(expected)], **options)[0]
        np.testing.assert_array_equal(np.array(row["embedding"], np.float32), vector.numpy())


def test_nothing_else_came_of_it(done):
    rows, expected, summary, _, _, folder = done
    assert set(rows) == set(EXPECTED)
    failed = sum(isinstance(each, str) for each in expected.values())
    assert (summary["rows"], summary["failed"]) == (len(EXPECTED), failed)
    assert (summary["missing"], summary["left_out"]) == (0, {})
    assert not any("unexpected" in (row["error"] or "") for row in rows.values())
    assert sorted(path.name for path in folder.iterdir()) == ["out", "photos", "some.tar"]
    assert not (folder.parent / "evil.png").exists()
    failures = {failure.id: failure.error for failure in nopad.read_features(folder / "out").failures}
    assert failures["loop.png"] == MADE["loop.png"]


def test_raising_the_limit_lets_larger_images_in(tmp_path, model):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(saved(np.zeros((400, 400), np.uint8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # Pillow refuses what has twice as many
        arguments = ["embed", f"{tmp_path}/photos", "--model", str(model), "--max-patches", "16", "--max-pixels"]
        assert main([*arguments, "159999", "--out", f"{tmp_path}/refused"]) == 1
        assert main([*arguments, "160000", "--out", f"{tmp_path}/taken"]) == 0
        assert Image.MAX_IMAGE_PIXELS == 20_000


def test_min_patches_enlarges_what_is_smaller_than_a_patch(tmp_path, model):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(saved(RGB[:1, :1]))
    arguments = ["embed", f"{tmp_path}/photos", "--model", str(model), "--out", f"{tmp_path}/out"]
    assert main([*arguments, "--min-patches", "1"]) == 0
    assert nopad.read_features(tmp_path / "out").grids.tolist() == [[1, 1, 1]]


FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "ICO")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_files_damaged_at_random_are_rows(tmp_path, model):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for format in FORMATS:
        whole = saved(RGB, format)
        for number in range(12):
            data = bytearray(whole)
            for _ in range(rng.integers(1, 12)):
                data[rng.integers(min(len(data), 200 if number % 2 else len(data)))] = rng.integers(256)
            (tmp_path / "photos" / f"{format}-{number}.png").write_bytes(data[: rng.integers(1, len(data) + 1)])
    options = {"model": model, "max_pixels": MAX_PIXELS, "max_patches": 64}
    summary = nopad.embed(tmp_path / "photos", tmp_path / "out", **options)
    assert summary.rows == 12 * len(FORMATS)
    assert summary.failed > 40
    features = nopad.read_features(tmp_path / "out")
    assert not [failure for failure in features.failures if "unexpected" in failure.error]
    assert np.isfinite(features.embeddings).all()

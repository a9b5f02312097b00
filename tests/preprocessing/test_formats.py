"""Formats that are read, and files that are cut short."""

import io
import sys

import numpy as np
import pytest
from image_samples import PHOTO, encoded, half, noise, pixel
from PIL import EpsImagePlugin, Image, features

from nopad.preprocessing import formats
from nopad.preprocessing.decode import ImageError, load_image
from nopad.preprocessing.file_structure import MAX_SCANS, count_scans
from nopad.preprocessing.formats import image_suffixes

# Formats


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n%%EOF\n"


def test_postscript_is_not_given_to_another_program(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # what starts it
    path = tmp_path / "holiday.jpg"
    path.write_bytes(POSTSCRIPT)
    for source in (path, POSTSCRIPT):
        with pytest.raises(ImageError, match="not an image that Pillow can read"):
            load_image(source)
    with pytest.raises(ImageError, match="EPS is drawn by another program, which is not started"):
        load_image(Image.open(path))


def test_suffixes_are_of_formats_that_are_read():
    assert {".jpg", ".mpo", ".webp", ".avif", ".heif", ".tif"} <= image_suffixes()
    assert not {".pdf", ".eps", ".ps", ".h5", ".hdf", ".grib", ".mpg", ".wmf", ".txt"} & image_suffixes()


def test_heic_is_read_upright():
    pillow_heif = pytest.importorskip("pillow_heif")
    squares = noise(5, 8).permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    heif = pillow_heif.from_pillow(Image.fromarray(squares))
    heif.save(file, quality=-1, chroma=444, exif=exif.tobytes())
    loaded = load_image(file.getvalue()).permute(1, 2, 0).numpy()
    assert np.abs(loaded.astype(int) - np.rot90(squares, -1)).max() <= 1
    assert "HEIF" not in Image.OPEN  # what else the process opens with Pillow is not changed
    with pytest.raises(ImageError, match="truncated or damaged"):
        load_image(half(file.getvalue()))


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1", b"mif1\0\0\0\0heic", b"msf1\0\0\0\0hevc"])
def test_heic_without_pillow_heif_says_what_to_install(monkeypatch, brands):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC needs pillow-heif: pip install '\.\[heic\]'"):
        load_image(b"\0\0\0\x14ftyp" + brands + bytes(99))


@pytest.mark.parametrize("is_read", [False, True])
def test_avif_says_what_is_wrong(monkeypatch, is_read):
    monkeypatch.setattr(formats, "readable_formats", lambda: ("PNG", "AVIF")[: 1 + is_read])
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda _: False))
    reason = "truncated or damaged" if is_read else r"AVIF needs Pillow 11.3 or newer: pip install '\.\[heic\]'"
    with pytest.raises(ImageError, match=reason):
        load_image(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif" + bytes(99))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read():
    squares = noise(5, 8).permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    data = encoded(Image.fromarray(squares), "AVIF", quality=100, subsampling="4:4:4")
    assert np.abs(load_image(data).permute(1, 2, 0).numpy().astype(int) - squares).max() <= 3


def many_scans(number: int) -> bytes:
    """A progressive JPEG of so many scans; the last is repeated."""
    data = encoded(Image.new("L", (16, 16), 128), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * (number - count_scans(data)) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded():
    assert load_image(many_scans(MAX_SCANS)).shape == (3, 16, 16)
    with pytest.raises(ImageError, match="a JPEG of 101 scans, expected at most 100"):
        load_image(many_scans(MAX_SCANS + 1))


def test_scans_of_thumbnails_and_what_follows_the_image_are_not_counted():
    data = encoded(PHOTO.resize((64, 64)), "JPEG", exif=b"Exif\0\0" + b"\xff\xda\0\x08" * 200)
    assert count_scans(data + many_scans(300)) == 1
    assert count_scans(encoded(PHOTO, "JPEG", progressive=True, restart_marker_blocks=1)) == 10


@pytest.mark.parametrize("share", [0.95, 0.6, 0.4])
@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_an_animation_that_is_cut_short_is_refused(format, share):
    frames = [Image.fromarray(noise(20, 30, seed).permute(1, 2, 0).numpy()) for seed in range(4)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert load_image(data).shape == (3, 20, 30)
    with pytest.raises(ImageError, match="truncated"):
        load_image(data[: int(len(data) * share)])


def test_a_gif_without_its_end_mark_is_read():
    frames = [Image.new("L", (4, 4), level) for level in (0, 255)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(load_image(data[:-1])) == [0, 0, 0]

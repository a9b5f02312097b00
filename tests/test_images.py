import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageDraw, ImageFile, features
from torch import Tensor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from nopad.families import family_of_published
from nopad.packing import patchify
from nopad.preprocessing import decode as images
from nopad.preprocessing import formats
from nopad.preprocessing.config import read_preprocessor_config
from nopad.preprocessing.decode import MAX_PIXELS, ImageError, _warn_of_lax_pillow, image_size, load, load_image
from nopad.preprocessing.file_structure import MAX_SCANS, count_scans
from nopad.preprocessing.formats import image_suffixes
from nopad.preprocessing.rules import Preprocessing
from nopad.preprocessing.transforms import preprocess

PHOTOS = sorted(path for path in (Path(__file__).parent.parent / "examples/images").iterdir() if path.suffix != ".md")
COFFEE = PHOTOS[0].parent / "coffee.jpg"
PHOTO = Image.open(COFFEE)

HALF = (0.5, 0.5, 0.5)
NATIVE = Preprocessing(rule="native", resample="bicubic", mean=HALF, std=HALF)
CROP = Preprocessing(
    rule="crop",
    size=224,
    resample="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
NAFLEX = Preprocessing(rule="naflex", resample="bilinear", mean=HALF, std=HALF)
SQUARE = Preprocessing(
    rule="square",
    size=224,
    resample="bilinear",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    rescale_before_resize=True,
)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pixel(image: Tensor, row: int = 0, column: int = 0) -> list[int]:
    return image[:, row, column].tolist()


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, colour: int = 2, lines: bytes = b"\0") -> bytes:
    """A PNG that promises a size and, unless told, holds hardly any pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", size)
        + png_chunk(b"IDAT", zlib.compress(lines))
        + png_chunk(b"IEND", b"")
    )


# Colours


def test_rgb_is_taken_as_it_is_from_every_kind_of_source(tmp_path):
    array = noise(5, 7).permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    path = tmp_path / "image.png"
    image.save(path)
    for source in (path, str(path), path.read_bytes(), image, array, torch.from_numpy(array).permute(2, 0, 1)):
        loaded = load_image(source)
        assert loaded.dtype == torch.uint8
        assert torch.equal(loaded, noise(5, 7))


def test_loading_leaves_the_array_and_does_not_share_its_memory():
    array = np.zeros((2, 2, 3), np.uint8)
    array.flags.writeable = False
    loaded = load_image(array)
    loaded += 1
    assert array.sum() == 0


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
def test_grey_fills_all_three_channels(shape):
    assert pixel(load_image(np.full(shape, 9, np.uint8))) == [9, 9, 9]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (257 * 100, 100), (65535, 255)])
@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_divided_by_257(mode, value, expected):
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (2, 1), np.array([value, value], dtype).tobytes())
    assert image.mode == mode
    assert pixel(load_image(image)) == [expected] * 3


def test_16_bit_png_is_not_clipped():
    image = Image.fromarray(np.array([[0, 32896, 65535]], np.uint16))
    assert load_image(encoded(image, "PNG"))[0].tolist() == [[0, 128, 255]]


def test_32_bit_grey_beyond_16_bit_is_refused():
    with pytest.raises(ImageError, match=r"expected 0\.\.65535, got 0\.\.65536"):
        load_image(Image.fromarray(np.array([[0, 65536]], np.int32)))


def test_float_grey_is_refused():
    with pytest.raises(ImageError, match="mode F"):
        load_image(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(("alpha", "expected"), [(0, [255, 255, 255]), (255, [200, 0, 0]), (51, [244, 204, 204])])
def test_alpha_is_composed_on_white(alpha, expected):
    array = np.full((2, 2, 4), (200, 0, 0, alpha), np.uint8)
    array[1, 1, 3] = 1
    assert pixel(load_image(array)) == expected
    assert pixel(load_image(encoded(Image.fromarray(array), "PNG"))) == expected


def test_grey_and_palette_alpha_is_composed_on_white():
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    palette = Image.new("PA", (2, 1), (0, 255))
    palette.putpalette([10, 10, 10])
    palette.putpixel((1, 0), (0, 0))
    for image in (grey, palette):
        assert load_image(image)[:, 0].T.tolist() == [[10, 10, 10], [255, 255, 255]]


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, "PNG", transparency=1))
    assert loaded[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize(
    ("array", "transparency"),
    [
        (np.array([[[9, 9, 9], [1, 2, 3]]], np.uint8), (1, 2, 3)),
        (np.array([[9, 7]], np.uint8), 7),
        (np.array([[9 * 257, 700]], np.uint16), 700),
    ],
    ids=["RGB", "L", "16 bit"],
)
def test_transparent_colour_becomes_white(array, transparency):
    loaded = load_image(encoded(Image.fromarray(array), "PNG", transparency=transparency))
    assert loaded[:, 0].T.tolist() == [[9, 9, 9], [255, 255, 255]]


def bmp_of_32_bits(rgb: np.ndarray) -> bytes:
    """A BMP with a V3 header and zero in each fourth byte, as some programs write it."""
    height, width, _ = rgb.shape
    pixels = np.concatenate([rgb[::-1, :, ::-1], np.zeros((height, width, 1), np.uint8)], axis=2).tobytes()
    header = struct.pack("<IiiHHIIiiII", 56, width, height, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    return b"BM" + struct.pack("<IHHI", 14 + 56 + len(pixels), 0, 0, 14 + 56) + header + pixels


def test_alpha_that_is_zero_throughout_is_no_transparency():
    rgb = noise(3, 5).permute(1, 2, 0).numpy()
    rgba = np.dstack([rgb, np.zeros((3, 5), np.uint8)])
    for source in (bmp_of_32_bits(rgb), rgba, encoded(Image.fromarray(rgba), "PNG")):
        assert torch.equal(load_image(source), noise(3, 5))


@pytest.mark.parametrize(
    ("array", "transparency", "expected"),
    [
        (np.full((2, 2, 3), (1, 2, 3), np.uint8), (1, 2, 3), [1, 2, 3]),
        (np.full((2, 2), 257 * 7, np.uint16), 257 * 7, [7, 7, 7]),
    ],
)
def test_transparent_colour_of_all_pixels_is_no_transparency(array, transparency, expected):
    assert pixel(load_image(encoded(Image.fromarray(array), "PNG", transparency=transparency))) == expected


def test_cmyk_becomes_rgb():
    loaded = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert loaded.shape == (3, 8, 8)
    assert np.abs(np.subtract(pixel(loaded), [255, 0, 0])).max() <= 2


def test_bilevel_becomes_black_and_white():
    assert pixel(load_image(Image.new("1", (2, 2), 1))) == [255, 255, 255]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixel(load_image(data)) == [255, 0, 0]


# Orientation: the upright image is [[1, 2, 3], [4, 5, 6]]; each row is how a camera stores it with that tag.
STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "lzw TIFF"])
@pytest.mark.parametrize("tag", STORED)
def test_exif_orientation_is_applied(tag, format):
    exif = Image.Exif()
    exif[0x0112] = tag
    options = {"compression": "tiff_lzw"} if format == "lzw TIFF" else {}
    data = encoded(Image.fromarray(np.array(STORED[tag], np.uint8)), format.split()[-1], exif=exif, **options)
    assert load_image(data)[0].tolist() == STORED[1]


def test_jpeg_of_a_phone_is_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert load_image(encoded(Image.new("RGB", (32, 16)), "JPEG", exif=exif)).shape == (3, 32, 16)


def test_a_palette_that_is_missing_is_told():
    with pytest.raises(ImageError, match=r"truncated or damaged \(AssertionError\); get the file again"):
        load(png_header(8, 8, colour=3, lines=b"\0\1\1\1\1\1\1\1\1" * 8))


@pytest.mark.parametrize("exif", [b"Exif\0\0" + b"no exif at all", b"Exif\0\0\0\x08\0\x02\x01\x12\0\x03"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_image(format, exif):
    image = Image.fromarray(noise(4, 8).permute(1, 2, 0).numpy())
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(image, format, exif=exif, **options)
    assert torch.equal(load_image(data), load_image(encoded(image, format, **options)))


PNG_METADATA = {
    "text": (b"zTXt", b"comment\0\0" + zlib.compress(bytes(2 << 20))),
    "colour profile": (b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20))),
    "colour profile of another compression": (b"iCCP", b"profile\0\1"),
    "gamma of too few bytes": (b"gAMA", b"\0"),
}


@pytest.mark.parametrize("case", PNG_METADATA)
@pytest.mark.parametrize("place", ["before the pixels", "behind the pixels"])
def test_metadata_that_pillow_refuses_does_not_cost_the_png(case, place):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(4, 8).permute(1, 2, 0).numpy()), "PNG", exif=exif)
    at = data.index(b"IDAT") - 4 if place == "before the pixels" else data.index(b"IEND") - 4
    odd = data[:at] + png_chunk(*PNG_METADATA[case]) + data[at:]
    with pytest.raises((ValueError, SyntaxError, OSError, IndexError)):
        Image.open(io.BytesIO(odd)).load()
    assert torch.equal(load_image(odd), load_image(data))
    assert load_image(odd).shape == (3, 8, 4)  # EXIF is kept
    assert image_size(odd) == (8, 4)
    assert image_size(png_header(8, 4)[:20]) is None


def test_a_wrong_checksum_of_png_metadata_does_not_cost_the_image():
    data = encoded(Image.fromarray(noise(4, 8).permute(1, 2, 0).numpy()), "PNG", dpi=(72, 72))
    place = data.index(b"pHYs") + 4
    odd = data[:place] + b"\xff" + data[place + 1 :]
    assert torch.equal(load_image(odd), noise(4, 8))


# PIL images: what the object stands for, not its file


def test_a_jpeg_after_draft_has_the_size_of_its_draft():
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (160, 80), "red"), "JPEG")))
    image.draft("RGB", (40, 20))
    assert load_image(image, max_pixels=800).shape == (3, 20, 40)


def test_an_mpo_gives_the_frame_where_it_stands_and_its_edits():
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert np.abs(np.subtract(pixel(load_image(image)), [0, 0, 255])).max() <= 2
    image = Image.open(io.BytesIO(data))
    image.putpixel((0, 0), (1, 2, 3))  # its file stays open
    assert pixel(load_image(image)) == [1, 2, 3]


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
    with pytest.raises(ImageError, match=r"HEIC needs pillow-heif: pip install 'nopad\[heic\]'"):
        load_image(b"\0\0\0\x14ftyp" + brands + bytes(99))


@pytest.mark.parametrize("is_read", [False, True])
def test_avif_says_what_is_wrong(monkeypatch, is_read):
    monkeypatch.setattr(formats, "readable_formats", lambda: ("PNG", "AVIF")[: 1 + is_read])
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, lambda _: False))
    reason = "truncated or damaged" if is_read else r"AVIF needs Pillow 11.3 or newer: pip install 'nopad\[heic\]'"
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


def test_scans_of_thumbnails_and_what_follows_the_picture_are_not_counted():
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


# What must fail, saying why


BAD_FILES = {
    "empty": (b"", "not an image"),
    "text": (b"<html>404</html>", "not an image"),
    "jpeg": (half(encoded(PHOTO, "JPEG")), "truncated"),
    "jpeg without its last hundred bytes": (encoded(PHOTO, "JPEG")[:-100], "truncated"),
    "progressive jpeg": (half(encoded(PHOTO, "JPEG", progressive=True)), "truncated"),
    "cmyk jpeg": (half(encoded(PHOTO.convert("CMYK"), "JPEG")), "truncated"),
    "png": (half(encoded(PHOTO, "PNG")), "truncated"),
    "gif": (half(encoded(PHOTO, "GIF")), "truncated"),
    "webp": (half(encoded(PHOTO, "WEBP")), "truncated|not an image"),
    "tiff": (half(encoded(PHOTO, "TIFF")), "truncated|not an image"),
    "bmp": (half(encoded(PHOTO, "BMP")), "truncated"),
    "png with hardly any pixels": (png_header(100, 100), "truncated"),
    "bomb": (png_header(20_000, 10_000), "max_pixels 178956970"),
    "bomb that Pillow refuses": (png_header(100_000, 100_000), "max_pixels 178956970"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(case, tmp_path):
    data, reason = BAD_FILES[case]
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(path)
    assert caught.value.source == str(path)
    with pytest.raises(ImageError, match=f"^{len(data)} bytes: .*({reason})"):
        load_image(data)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(64, 48), (301, 199)])
def test_jpeg_decoders_agree(size, subsampling, progressive, monkeypatch):
    pytest.importorskip("simplejpeg")
    data = encoded(PHOTO.resize(size), "JPEG", subsampling=subsampling, progressive=progressive)
    fast = load_image(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(fast, load_image(data))


def test_jpeg_that_only_pillow_reads(monkeypatch):
    pytest.importorskip("simplejpeg")
    data = encoded(PHOTO, "JPEG")
    data = data[:-2] + b"junk" * 16 + data[-2:]  # libjpeg warns of it and goes on
    with pytest.raises(ValueError, match="extraneous bytes"):
        images.simplejpeg.decode_jpeg(data, "RGB", strict=True)
    lenient = load_image(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(lenient, load_image(data))


def test_max_pixels_is_checked_before_decoding():
    data = png_header(100, 100)  # decoding it would say that it is truncated
    with pytest.raises(ImageError, match="100×100 is 10000 pixels, expected 1 to max_pixels 9999"):
        load_image(data, max_pixels=9_999)
    with pytest.raises(ImageError, match="max_pixels 9999"):
        load_image(Image.open(io.BytesIO(data)), max_pixels=9_999)
    assert load_image(Image.new("L", (100, 100)), max_pixels=10_000).shape == (3, 100, 100)


def test_lax_pillow_is_warned_of(monkeypatch, caplog):
    _warn_of_lax_pillow.cache_clear()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    load_image(Image.new("L", (1, 1)))
    assert "LOAD_TRUNCATED_IMAGES" in caplog.text


def test_files_that_cannot_be_opened(tmp_path):
    missing = tmp_path / "missing.jpg"
    with pytest.raises(ImageError, match=r"missing\.jpg: cannot be opened: No such file"):
        load_image(missing)
    with pytest.raises(ImageError, match="cannot be opened: Is a directory"):
        load_image(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(tmp_path):
    path = tmp_path / "image.png"
    path.touch(mode=0)
    with pytest.raises(ImageError, match="cannot be opened: Permission denied"):
        load_image(path)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4,), np.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
        None,
        4,
    ],
    ids=lambda source: f"{type(source).__name__} {getattr(source, 'dtype', '')} {getattr(source, 'shape', '')}",
)
def test_other_arrays_and_objects_are_refused(source):
    with pytest.raises(ImageError, match="expected"):
        load_image(source)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("cat.jpg", "truncated")))
    assert isinstance(error, ValueError)
    assert (error.source, error.reason, str(error)) == ("cat.jpg", "truncated", "cat.jpg: truncated")


def test_import_is_light_and_sets_no_globals():
    code = "import sys, nopad.preprocessing.transforms; from PIL import ImageFile; "
    code += "assert 'transformers' not in sys.modules and not ImageFile.LOAD_TRUNCATED_IMAGES"
    subprocess.run([sys.executable, "-c", code], check=True)


# Clips


def test_clip_is_loaded_from_frames_arrays_and_tensors():
    clip = torch.stack([noise(4, 6, seed) for seed in range(3)])
    array = clip.permute(0, 2, 3, 1).numpy()
    for source in (clip, array, list(array), [Image.fromarray(frame) for frame in array]):
        assert torch.equal(load(source), clip)
    assert load(clip[:1]).shape == (1, 3, 4, 6)
    assert load(array[0]).shape == (3, 4, 6)


def test_clip_of_unequal_or_no_frames_is_refused():
    with pytest.raises(ImageError, match=r"clip of 2 frames: .* got \(height, width\) \(4, 6\), \(6, 4\)"):
        load([noise(4, 6), noise(6, 4)])
    with pytest.raises(ImageError, match=r"clip of 0 frames: .* got none"):
        load([])


@pytest.mark.parametrize("resize", ["pil", "torch"])
@pytest.mark.parametrize("preprocessing", [NATIVE, CROP, NAFLEX, SQUARE], ids=lambda p: p.rule)
def test_frames_of_a_clip_are_preprocessed_like_images(preprocessing, resize):
    clip = torch.stack([noise(60, 90, seed) for seed in range(3)])
    frames = [preprocess(frame, preprocessing, 16, resize=resize) for frame in clip]
    assert torch.equal(preprocess(clip, preprocessing, 16, resize=resize), torch.stack(frames))


# Equal to the original processors

SHAPES = [(300, 451), (451, 300), (224, 224), (64, 64), (97, 1000), (1, 1), (2, 150), (223, 225)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_equals_clip_bit_for_bit(shape):
    image = noise(*shape)
    expected = CLIPImageProcessorPil()(image.permute(1, 2, 0).numpy(), input_data_format="channels_last")
    assert torch.equal(preprocess(image, CROP, 14, resize="pil"), torch.from_numpy(expected["pixel_values"][0]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crop_of_a_longer_short_side_equals_the_processor_bit_for_bit(shape):
    image = noise(*shape)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=squared(224), image_mean=CROP.mean, image_std=CROP.std
    )
    expected = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last")["pixel_values"][0]
    rule = dataclasses.replace(CROP, short_side=256)
    assert torch.equal(preprocess(image, rule, 14, resize="pil"), torch.from_numpy(expected))


@pytest.mark.parametrize("max_patches", [None, 1, 64, 1024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naflex_equals_siglip2_bit_for_bit(shape, max_patches):
    image = noise(*shape)
    processor = Siglip2ImageProcessorPil(max_num_patches=max_patches or 256)
    rule = dataclasses.replace(NAFLEX, max_patches=max_patches)
    expected = processor(image.permute(1, 2, 0).numpy(), input_data_format="channels_last", return_tensors="pt")
    patches, (_, rows, columns) = patchify(preprocess(image, rule, 16, resize="pil"), 16)
    assert [rows, columns] == expected["spatial_shapes"][0].tolist()
    assert torch.equal(patches, expected["pixel_values"][0, : rows * columns])


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photo_equals_clip_from_the_file_on(path):
    expected = CLIPImageProcessorPil()(Image.open(path))["pixel_values"][0]
    assert torch.equal(preprocess(load_image(path), CROP, 14, resize="pil"), torch.from_numpy(expected))


def published(name: str) -> tuple[Preprocessing, int]:
    """The rule that a family gives a published model, and its patch size."""
    family = family_of_published(name)
    with torch.device("meta"):
        encoder = family(family.published_config(name))
    return encoder.default_preprocessing, encoder.patch_size


def squared(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


PIXEL_PROCESSORS = {
    "apple/aimv2-large-patch14-224": CLIPImageProcessorPil(),
    "apple/aimv2-large-patch14-336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=squared(336)),
    "apple/aimv2-large-patch14-native": CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
    "lmms-lab-encoder/onevision-encoder-large": CLIPImageProcessorPil(
        size={"shortest_edge": 448}, crop_size=squared(448)
    ),
    "openai/clip-vit-base-patch32": CLIPImageProcessorPil(),
    "apple/DFN5B-CLIP-ViT-H-14-378": CLIPImageProcessorPil(size={"shortest_edge": 378}, crop_size=squared(378)),
    "facebook/dinov2-base": BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=squared(224), image_mean=list(SQUARE.mean), image_std=list(SQUARE.std)
    ),
    "google/siglip2-base-patch16-256": SiglipImageProcessorPil(size=squared(256)),
    "google/siglip-so400m-patch14-384": SiglipImageProcessorPil(size=squared(384)),
}
ODD_SHAPES = [shape for shape in SHAPES if min(shape) >= 14]  # smaller ones are no image for a native model
SUBJECTS = [*PHOTOS, *ODD_SHAPES]


def subject(which: Path | tuple[int, int]) -> tuple[Tensor, Image.Image]:
    """A photo or noise of a shape, as nopad loads it and as a processor takes it."""
    if isinstance(which, Path):
        return load_image(which), Image.open(which).convert("RGB")
    image = noise(*which)
    return image, Image.fromarray(image.permute(1, 2, 0).numpy())


def name_of(which: object) -> str:
    return which.stem if isinstance(which, Path) else str(which).rsplit("/", 1)[-1]


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
@pytest.mark.parametrize("name", PIXEL_PROCESSORS, ids=name_of)
def test_rule_of_a_family_equals_its_processor_bit_for_bit(name, which):
    rule, patch_size = published(name)
    image, picture = subject(which)
    expected = PIXEL_PROCESSORS[name](picture, return_tensors="pt")["pixel_values"][0]
    rows, columns = (side // patch_size for side in expected.shape[1:])  # the stride of the original drops the rest
    pixels = preprocess(image, rule, patch_size, resize="pil")
    assert torch.equal(pixels, expected[:, : rows * patch_size, : columns * patch_size])


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
def test_rule_of_naflex_equals_siglip2_bit_for_bit(which):
    rule, patch_size = published("google/siglip2-so400m-patch16-naflex")
    image, picture = subject(which)
    expected = Siglip2ImageProcessorPil()(picture, return_tensors="pt")
    patches, (_, rows, columns) = patchify(preprocess(image, rule, patch_size, resize="pil"), patch_size)
    assert [rows, columns] == expected["spatial_shapes"][0].tolist()
    assert torch.equal(patches, expected["pixel_values"][0, : rows * columns])


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("facebook/dinov3-vits16-pretrain-lvd1689m", SQUARE.mean, SQUARE.std),
        ("facebook/dinov3-vitl16-pretrain-sat493m", (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
    ],
    ids=name_of,
)
def test_rule_of_dinov3_equals_the_steps_of_its_processor(name, mean, std, which):
    """DINOv3ViTImageProcessor cannot be imported without torchvision, so its documented arithmetic stands in for it.

    Its `_preprocess` rescales, resizes in float and normalises; torchvision does these by the operations below.
    """
    rule, patch_size = published(name)
    image, _ = subject(which)
    pixels = image.contiguous() * (1 / 255)
    if pixels.shape[1:] != (224, 224):
        pixels = torch.nn.functional.interpolate(pixels[None], (224, 224), mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    assert torch.equal(preprocess(image, rule, patch_size, resize="pil"), (pixels - mean) / std)


@pytest.mark.parametrize("which", SUBJECTS, ids=name_of)
def test_torch_resize_is_within_a_grey_level_of_the_float_resize(which):
    grey = dataclasses.replace(SQUARE, mean=(0, 0, 0), std=(1, 1, 1))
    image, _ = subject(which)
    fast, exact = (preprocess(image, grey, 16, resize=resize) * 255 for resize in ("torch", "pil"))
    assert torch.equal(fast.round(), fast)
    assert (fast - exact).abs().max() < 1.01


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, 1.0])
def test_rescale_equals_transformers_for_every_grey_level(factor):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, rescale_factor=factor)
    expected = processor(levels.numpy(), input_data_format="channels_first")["pixel_values"][0]
    own = Preprocessing(rule="native", resample="bicubic", mean=CROP.mean, std=CROP.std, rescale_factor=factor)
    assert torch.equal(preprocess(levels, own, 16), torch.from_numpy(expected))


def page(height: int, width: int) -> Tensor:
    """Black text on white."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for top in range(4, height, 14):
        draw.text(
            (6, top), "The quick brown fox jumps over the lazy dog 0123456789 " * (1 + width // 200), fill="black"
        )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def black_and_white(height: int, width: int) -> Tensor:
    return noise(height, width) // 128 * 255


TALL, WIDE, ENLARGED = (1600, 600), (700, 1000), (150, 100)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [TALL, WIDE, ENLARGED, (500, 333), (320, 90), (1000, 224)])
@pytest.mark.parametrize("draw", [page, black_and_white], ids=name_of)
def test_torch_resize_of_hard_edges_is_within_two_grey_levels_of_pillow(draw, shape, resample):
    """Passes in another order than Pillow's are up to 30 levels away: each clips what the filter overshoots."""
    grey = Preprocessing(rule="square", size=224, resample=resample, mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)
    fast, exact = (preprocess(draw(*shape), grey, 14, resize=resize) for resize in ("torch", "pil"))
    difference = (fast - exact).abs()
    assert difference.max() <= 2
    assert (difference > 1).float().mean() <= 5e-4
    assert (difference > 0).float().mean() <= 0.05


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_torch_resize_of_photos_is_within_a_grey_level_of_pillow(path, resample):
    grey = Preprocessing(rule="crop", size=112, resample=resample, mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)
    image = load_image(path)
    difference = preprocess(image, grey, 14, resize="torch") - preprocess(image, grey, 14, resize="pil")
    assert difference.abs().max() <= 1


# Native


def test_native_drops_the_remainder_at_the_right_and_the_bottom():
    image = noise(29, 45)
    expected = image[:, :28, :42].float() / 255 * 2 - 1
    assert torch.allclose(preprocess(image, NATIVE, 14), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 1), (14, 14)), ((1, 2000), (14, 28000)), ((2000, 1), (28000, 14)), ((5, 31), (14, 84)), ((13, 14), (14, 14))],
)
@pytest.mark.parametrize("resize", ["pil", "torch"])
def test_native_enlarges_what_is_smaller_than_a_patch(shape, expected, resize):
    image = torch.full((3, *shape), 255, dtype=torch.uint8)
    assert torch.equal(preprocess(image, NATIVE, 14, resize=resize), torch.ones(3, *expected))


@pytest.mark.parametrize(
    ("shape", "max_patches", "expected"),
    [
        ((1400, 1400), 256, (16, 16)),
        ((140, 140), 100, (10, 10)),
        ((140, 140), 99, (9, 9)),
        ((300, 300), 256, (16, 16)),  # 300 · √(256 · 14² / 300²) is 223.99999999999997 in float64
        ((280, 1120), 64, (4, 16)),
        ((1, 2000), 50, (1, 50)),
        ((14, 1400), 1, (1, 1)),
    ],
)
def test_native_is_scaled_down_to_max_patches(shape, max_patches, expected):
    pixels = preprocess(noise(*shape), NATIVE.with_size(max_patches=max_patches), 14)
    assert (pixels.shape[1] // 14, pixels.shape[2] // 14) == expected


@pytest.mark.parametrize("rule", [NATIVE, CROP, NAFLEX, SQUARE], ids=lambda rule: rule.rule)
@pytest.mark.parametrize("shape", [(300, 200), (9, 1200), (280, 280)])
def test_grid_is_that_of_preprocessed_pixels(rule, shape):
    pixels = preprocess(noise(*shape), rule, 14)
    place = rule.place(*shape, 14)
    assert (place.rows, place.columns) == (pixels.shape[1] // 14, pixels.shape[2] // 14)


def test_automatic_cap_is_for_rules_without_a_limit():
    own = dataclasses.replace(NATIVE, max_patches=9000)
    assert [rule.capped("auto") for rule in (NATIVE, own, CROP, NAFLEX, SQUARE)] == [4096, None, None, None, None]
    assert [NATIVE.with_size(size).capped("auto") for size in (500, (500, 500))] == [4096, None]
    assert NATIVE.with_size(min_patches=5000).capped("auto") == 5000
    assert [NATIVE.capped(limit) for limit in (None, 5, 9000)] == [None, 5, 9000]


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 2000), st.sampled_from([14, 16]))
def test_native_never_exceeds_max_patches_nor_loses_the_image(height, width, max_patches, patch_size):
    resized = NATIVE.with_size(max_patches=max_patches)._resized(height, width, patch_size)
    rows, columns = (side // patch_size for side in resized)
    assert 1 <= rows * columns <= max_patches
    if min(height, width) >= patch_size and (height // patch_size) * (width // patch_size) <= max_patches:
        assert resized == (height, width)
    if rows > 1 and columns > 1:  # else squeezed or enlarged
        assert abs(resized[0] * width - resized[1] * height) <= max(height, width) + 1


# Arguments


def test_extreme_aspect_ratio_is_refused_before_it_takes_memory():
    with pytest.raises(ImageError, match=rf"image of 1×4000 .*224×896000, expected at most {MAX_PIXELS}"):
        preprocess(noise(1, 4000), CROP, 14)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image": torch.zeros(3, 28, 28)}, "image: expected uint8"),
        ({"image": torch.zeros(28, 28, 3, dtype=torch.uint8)}, "image: expected uint8"),
        ({"image": torch.zeros(3, 0, 28, dtype=torch.uint8)}, "image: expected uint8"),
        ({"resize": "opencv"}, "resize: expected one of"),
        ({"preprocessing": SQUARE, "patch_size": 225}, "'square' makes 224 × 224 pixels, expected at least 225 × 225"),
    ],
)
def test_wrong_arguments_are_named(change, match):
    arguments = {"image": noise(28, 28), "preprocessing": NATIVE, "patch_size": 14} | change
    with pytest.raises(ValueError, match=match):
        preprocess(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rule": "pad"}, "rule: expected one of"),
        ({"resample": "lanczos"}, "resample: expected one of"),
        ({"size": 224}, "size: expected None for 'native', got 224"),
        ({"rule": "crop"}, "size: expected pixels ≥ 1 for 'crop', got None"),
        ({"rule": "square", "size": 224, "max_patches": 4}, "max_patches: expected None for 'square'"),
        ({"max_patches": 0}, "max_patches: expected an integer ≥ 1"),
        ({"max_patches": 3, "multiple_of": 2}, "max_patches: expected an integer ≥ 4 for 'native', got 3"),
        ({"min_patches": 5, "max_patches": 4}, "min_patches: expected at most max_patches 4, got 5"),
        ({"rule": "naflex", "min_patches": 5}, "min_patches: expected None for 'naflex', which fills up"),
        ({"multiple_of": 0}, "multiple_of: expected an integer ≥ 1, got 0"),
        (
            {"rule": "height_width", "size": 5},
            "pixels ≥ 1 for 'height_width', got 5",
        ),
        ({"rule": "shortest_edge", "size": (5, 5)}, r"size: expected pixels ≥ 1 for 'shortest_edge', got \(5, 5\)"),
        ({"short_side": 256}, "short_side: expected None for 'native', got 256"),
        ({"rule": "crop", "size": 224, "short_side": 223}, "short_side: expected pixels ≥ 224 for 'crop', got 223"),
        ({"std": (1.0, 0.0, 1.0)}, "mean, std"),
        ({"mean": (0.5,)}, "mean, std"),
    ],
)
def test_preprocessing_checks_itself(change, match):
    fields = {"rule": "native", "resample": "bicubic", "mean": HALF, "std": HALF} | change
    with pytest.raises(ValueError, match=match):
        Preprocessing(**fields)


# preprocessor_config.json

CLIP_STATISTICS = {"image_mean": list(CROP.mean), "image_std": list(CROP.std)}
IMAGENET = {"image_mean": list(SQUARE.mean), "image_std": list(SQUARE.std)}
SHORT = dataclasses.replace(CROP, short_side=256)
RESIZED = {"do_resize": True, "do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True}


@pytest.mark.parametrize(
    ("config", "default", "expected"),
    [
        ({}, NATIVE, NATIVE),
        ({}, CROP, CROP),
        ({}, NAFLEX, NAFLEX),
        ({}, SQUARE, SQUARE),
        (
            RESIZED
            | CLIP_STATISTICS
            | {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": 224},
                "do_center_crop": True,
                "crop_size": {"height": 224, "width": 224},
                "resample": 3,
            },
            NATIVE,
            CROP,
        ),
        ({"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 3} | CLIP_STATISTICS, NAFLEX, CROP),
        ({"image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 256, "patch_size": 16, "size": None}
         | RESIZED | {"image_mean": list(HALF), "image_std": 0.5, "resample": 2}, NAFLEX,
         Preprocessing(rule="naflex", max_patches=256, resample="bilinear", mean=HALF, std=HALF)),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 384, "width": 384}, "resample": 3},
         NAFLEX, Preprocessing(rule="square", size=384, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 224, "width": 224},
          "crop_size": None, "do_center_crop": None, "default_to_square": True, "resample": 2} | RESIZED | IMAGENET,
         SQUARE, SQUARE),
        ({"image_processor_type": "ViTImageProcessor", "size": 518}, SQUARE,
         Preprocessing(rule="square", size=518, resample="bilinear", mean=HALF, std=HALF)),
        ({"image_processor_type": "CLIPImageProcessorFast"}, NATIVE,
         Preprocessing(rule="crop", size=224, resample="bicubic", mean=CROP.mean, std=CROP.std)),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 112, "width": 112}}, CROP,
         Preprocessing(rule="square", size=112, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "SiglipImageProcessor"}, NAFLEX,
         Preprocessing(rule="square", size=224, resample="bicubic", mean=HALF, std=HALF)),
        ({"image_processor_type": "Siglip2ImageProcessorFast"}, SQUARE,
         Preprocessing(rule="naflex", max_patches=256, resample="bilinear", mean=HALF, std=HALF)),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, CROP, SHORT),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256}}, CROP, SHORT),
        ({}, SHORT, SHORT),
        ({"size": {"shortest_edge": 224}}, SHORT, CROP),
        ({"do_resize": False, "do_center_crop": False, "size": {"shortest_edge": 224}}, CROP,
         Preprocessing(rule="native", resample="bicubic", mean=CROP.mean, std=CROP.std)),
        ({"do_normalize": False, "do_rescale": False}, NATIVE,
         Preprocessing(rule="native", resample="bicubic", mean=(0, 0, 0), std=(1, 1, 1), rescale_factor=1.0)),
        ({"rescale_factor": 1 / 127.5}, NATIVE,
         Preprocessing(rule="native", resample="bicubic", mean=HALF, std=HALF, rescale_factor=1 / 127.5)),
    ],
)  # fmt: skip
def test_config_of_a_checkpoint_wins_over_the_default(config, default, expected):
    assert read_preprocessor_config(json.loads(json.dumps(config)), default) == expected


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"size": {"shortest_edge": 224}, "crop_size": {"height": 256, "width": 256}}, "'shortest_edge': 224"),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True}, "'height': 256"),
        ({"size": {"shortest_edge": 224}, "do_center_crop": False}, "preprocessor config: expected"),
        ({"do_center_crop": False}, "preprocessor config: expected"),
        ({"do_resize": False}, "preprocessor config: expected"),
        ({"max_num_patches": 256, "do_center_crop": True}, "preprocessor config: expected"),
        ({"size": {"height": 224, "width": 384}}, "size: expected"),
        ({"size": {"longest_edge": 224}}, "size: expected"),
        ({"size": "big"}, "size: expected"),
        ({"resample": 1}, r"resample: expected 2 \(bilinear\) or 3 \(bicubic\), got 1"),
        ({"do_pad": True}, "do_pad"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": 336}, "'crop_size': 336"),
        ({"image_processor_type": "SiglipImageProcessor", "size": 112}, "preprocessor config: expected"),
    ],
)
def test_config_that_no_rule_reproduces_is_refused(config, match):
    with pytest.raises(ValueError, match=match):
        read_preprocessor_config(config, CROP)


def test_describe_says_which_resize_was_used():
    assert CROP.describe("pil") == (
        "crop 224; bicubic antialiased (pil); rescale 1/255 after resize; mean 0.481455, 0.457827, 0.408211; "
        "std 0.26863, 0.261303, 0.275777; EXIF upright, RGB, alpha on white"
    )
    assert "(torch uint8)" in CROP.describe()
    assert dataclasses.replace(CROP, short_side=256).describe().startswith("crop 224 of short side 256; bicubic")
    assert NAFLEX.describe().startswith("naflex at most 256 patches; ")
    assert NATIVE.with_size(max_patches=100).describe().startswith("native at most 100 patches; ")
    assert "(torch float); rescale 1/255 before resize" in SQUARE.describe("pil")
    assert "(torch uint8); rescale 1/255 after resize" in SQUARE.describe("torch")

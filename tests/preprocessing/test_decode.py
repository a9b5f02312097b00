"""Colours, orientation, clips, and sources that are refused."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from image_samples import CROP, NAFLEX, NATIVE, PHOTO, SQUARE, encoded, half, noise, pixel, png_chunk, png_header
from PIL import Image, ImageFile

from nopad.preprocessing import decode as images
from nopad.preprocessing.decode import ImageError, _warn_of_lax_pillow, image_size, load_image
from nopad.preprocessing.load import load
from nopad.preprocessing.transforms import preprocess

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


def test_a_missing_palette_is_an_error():
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
    with pytest.raises(ImageError, match="cannot be opened: expected a regular file, got a folder"):
        load_image(tmp_path)
    (link := tmp_path / "link.jpg").symlink_to(link)
    with pytest.raises(ImageError, match="cannot be opened: Too many levels of symbolic links"):
        load_image(link)
    with pytest.raises(ImageError, match=r"cannot be opened: .*embedded null"):
        load_image("null\0.jpg")


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

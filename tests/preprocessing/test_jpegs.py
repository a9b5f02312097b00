"""JPEGs at a fraction of their size: what the check lets pass, and what is decoded so."""

import io
import random

import numpy as np
import pytest
import simplejpeg
from numpy.lib.stride_tricks import as_strided
from PIL import Image

from nopad.preprocessing.decode import UPRIGHT, ImageError, load_image
from nopad.preprocessing.jpegs import CheckedJpeg, check_jpeg, scaled_jpeg, upright, upright_size, upright_strides


def make_image(width: int = 83, height: int = 61, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def passes(data: bytes) -> bool:
    """Whether a file passes, with the small image and without it."""
    with_pixels, without = (check_jpeg(data, max_pixels=1 << 20, min_side=side) is not None for side in (1, None))
    assert with_pixels == without
    return without


def decodes(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    "options",
    [{"subsampling": n} for n in (0, 1, 2)] + [{"restart_marker_rows": 1}, {"quality": 20}, {"comment": b"\xff\xc2"}],
)
def test_plain_ones_pass(options):
    checked = check_jpeg(jpeg(make_image(), **options), max_pixels=1 << 20)
    assert isinstance(checked, CheckedJpeg)
    assert (checked.width, checked.height, checked.orientation) == (83, 61, 1)
    assert checked.small is None


@pytest.mark.parametrize(
    "data",
    [
        jpeg(make_image(), progressive=True),
        jpeg(make_image(mode="L")),
        jpeg(make_image(mode="CMYK")),
        jpeg(make_image(), keep_rgb=True),
        jpeg(make_image(2000, 1000)),
        b"",
        b"\xff\xd8\xff\xc0",
    ],
    ids=["progressive", "grey", "CMYK", "RGB", "large", "empty", "cut"],
)
def test_others_are_left_to_the_cpu(data):
    assert not passes(data)


def test_coding_is_that_of_the_frame_alone():
    """The bytes of a frame's marker may stand in a table, as those of quality 20 do, or in a comment."""
    extended = jpeg(make_image(), comment=b"\xff\xc0").replace(b"\xff\xc0\x00\x11", b"\xff\xc1\x00\x11")
    assert decodes(extended)
    assert not passes(extended)


def test_sizes_that_pillow_refuses_are_left_to_the_cpu():
    data = jpeg(make_image())
    size = data.index(b"\xff\xc0") + 5
    huge = data[:size] + b"\x7f\xff\x7f\xff" + data[size + 4 :]
    assert not passes(huge)
    assert scaled_jpeg(huge, lambda height, width: (1, 1), max_pixels=1 << 20) is None


def test_files_that_are_cut_or_damaged_pass_where_they_decode_whole():
    """What the GPU fills up without a word, libjpeg-turbo refuses at each of its scales."""
    draw = random.Random(0)
    data = jpeg(make_image(160, 120), quality=70)
    body = data.index(b"\xff\xda") + 14
    cuts = [data[:end] for end in (*range(body, len(data), 61), len(data) - 3, len(data) - 1)]
    ended = [cut + b"\xff\xd9" for cut in cuts[::5]]
    flipped = []
    for _ in range(300):
        changed = bytearray(data)
        changed[draw.randrange(2, len(data))] ^= 1 << draw.randrange(8)
        flipped.append(bytes(changed))
    assert not any(passes(cut) for cut in cuts)
    passed = [(passes(file), decodes(file)) for file in (*ended, *flipped)]
    assert not any(here and not there for here, there in passed)
    assert sum(here for here, _ in passed) > 20  # a wrong level is no damage that a decoder can see


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_read_upright_by_strides(orientation):
    image = make_image()
    stored = np.array(image)
    expected = np.array(image.transpose(UPRIGHT[orientation]) if orientation > 1 else image)
    assert upright_size(83, 61, orientation) == expected.shape[:2]
    start, to_row, to_column = upright_strides(83, 61, stored.strides[0], orientation)
    flat = stored.reshape(-1)[start:]
    read = as_strided(flat, expected.shape, (to_row, to_column, 1))
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(upright(stored, orientation).permute(1, 2, 0), expected)


def test_the_small_image_is_as_large_as_a_thumbnail_needs():
    data = jpeg(make_image(400, 200))
    checked = check_jpeg(data, max_pixels=1 << 20, min_side=130)
    assert checked is not None
    assert checked.small.shape == (75, 150, 3)  # at 3/8
    small = check_jpeg(jpeg(make_image(90, 40)), max_pixels=1 << 20, min_side=130)
    assert small is not None
    np.testing.assert_array_equal(small.small, load_image(jpeg(make_image(90, 40))).permute(1, 2, 0))


@pytest.mark.parametrize(
    ("min_size", "scale"), [((200, 100), 1), ((101, 50), 1), ((100, 51), 1), ((100, 50), 2), ((26, 9), 4)]
)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_scaled_pixels_are_upright_and_large_enough(min_size, scale, orientation):
    image, exif = make_image(200, 100).resize((200, 100)), Image.Exif()
    exif[0x0112] = orientation
    is_turned = orientation >= 5
    data = jpeg(image, exif=exif, quality=95)
    whole = (200, 100) if is_turned else (100, 200)
    decoded = scaled_jpeg(data, lambda *size: min_size if is_turned else min_size[::-1], max_pixels=1 << 20)
    assert decoded is not None
    pixels, size = decoded
    assert size == whole == tuple(load_image(data).shape[1:])
    assert tuple(pixels.shape) == (3, whole[0] // scale, whole[1] // scale)
    expected = Image.fromarray(load_image(data).permute(1, 2, 0).numpy()).reduce(scale)
    difference = np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
    assert difference.mean() < 16  # of noise; turned the wrong way it would be 30 and more


@pytest.mark.parametrize(
    "data",
    [
        jpeg(make_image(mode="L")),
        jpeg(make_image(mode="CMYK")),
        jpeg(make_image(2000, 1000)),
        jpeg(make_image())[:900],
        b"",
        b"GIF89a",
    ],
    ids=["grey", "CMYK", "large", "cut", "empty", "GIF"],
)
def test_what_is_not_scaled(data):
    assert scaled_jpeg(data, lambda height, width: (1, 1), max_pixels=1 << 20) is None


def test_a_size_that_the_rule_refuses_is_not_scaled():
    def refuse(height: int, width: int) -> tuple[int, int]:
        raise ImageError("image", f"{height}×{width}")

    assert scaled_jpeg(jpeg(make_image()), refuse, max_pixels=1 << 20) is None

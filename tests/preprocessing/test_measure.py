"""The size of an image before it is decoded is that after it."""

import io
import os

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from nopad.preprocessing import measure as module
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.load import load, measure_snapshot
from nopad.preprocessing.measure import measure


def encoded(format: str, orientation: int = 1) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(noise(0, 12, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, format, **({"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "ICO", "PPM"])
def test_size_is_that_of_the_decoded_image(format, orientation, tmp_path):
    data = encoded(format, orientation)
    path = tmp_path / "picture"
    path.write_bytes(data)
    expected = (1, *load(data).shape[1:])
    for source in (data, path, str(path), Image.open(io.BytesIO(data))):
        assert measure(source) == expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_pixels_of_common_formats_are_not_decoded(format, monkeypatch):
    monkeypatch.setattr(module, "load", None)
    assert measure(encoded(format)) == (1, 12, 20)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.zeros((5, 7), np.uint8), (1, 5, 7)),
        (np.zeros((5, 7, 3), np.uint8), (1, 5, 7)),
        (np.zeros((2, 5, 7, 3), np.uint8), (2, 5, 7)),
        (torch.zeros(3, 5, 7, dtype=torch.uint8), (1, 5, 7)),
        (torch.zeros(4, 3, 5, 7, dtype=torch.uint8), (4, 5, 7)),
        ([np.zeros((5, 7, 3), np.uint8)] * 3, (3, 5, 7)),
    ],
)
def test_sizes_of_arrays_and_clips(source, expected):
    assert measure(source) == expected


@pytest.mark.parametrize("source", [b"no image", "nowhere.jpg", 7, encoded("JPEG")[:20]])
def test_what_is_no_image_is_an_error(source):
    with pytest.raises(ImageError):
        measure(source)


@pytest.mark.parametrize("read", [load, measure])
def test_pipes_are_not_waited_for_and_devices_not_read(read, tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match=r"pipe\.jpg: cannot be opened: expected a regular file, got a named pipe"):
        read(str(pipe))
    with pytest.raises(ImageError, match="/dev/zero: cannot be opened: expected a regular file, got a device"):
        read("/dev/zero")
    assert measure_snapshot(str(pipe)) == measure_snapshot("/dev/zero") == (1, 0, 0)

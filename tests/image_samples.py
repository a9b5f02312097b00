"""Photos, rules and encoded pictures that the tests of preprocessing share."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nopad.preprocessing.rules import Preprocessing

EXAMPLES = Path(__file__).parent.parent / "examples" / "images"
PHOTOS = sorted(path for path in EXAMPLES.iterdir() if path.suffix != ".md")
COFFEE = EXAMPLES / "coffee.jpg"
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

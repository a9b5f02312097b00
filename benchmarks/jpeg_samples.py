"""JPEGs for `benchmarks/jpeg_codes.py`: small, damaged, and on plain grounds."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples/images"


def canvases(number: int) -> list[bytes]:
    """Photos on a plain ground, whose codes repeat, so that lanes there hardly synchronise."""
    draw = random.Random(0)
    sources = _sources()
    files = []
    for _ in range(number):
        canvas = Image.new("RGB", (1400, 1200), draw.choice(("white", "white", "grey", (240, 240, 250))))
        share = draw.uniform(0.3, 1)
        width, height = int(1400 * share), int(1200 * share)
        canvas.paste(draw.choice(sources).resize((width, height)), ((1400 - width) // 2, (1200 - height) // 2))
        files.append(encoded(canvas, quality=85, optimize=draw.random() < 0.5))
    return files


def small_files() -> Iterator[bytes]:
    """Parts of the example photos, and grey, of odd sizes, in all samplings, at several qualities."""
    draw = random.Random(0)
    for source in (*_sources(), Image.new("RGB", (98, 70), "grey")):
        for quality, subsampling, optimize in itertools.product((30, 75, 95), (0, 1, 2), (False, True)):
            yield encoded(small(source, draw), quality=quality, subsampling=subsampling, optimize=optimize)


def damaged_files(number: int) -> Iterator[bytes]:
    """Small files with one or a few faults each, most of them in their codes."""
    draw = random.Random(0)
    whole = list(small_files())
    for _ in range(number):
        yield damage(draw.choice(whole), draw)


def damage(data: bytes, draw: random.Random) -> bytes:
    """A file with one kind of fault."""
    changed = bytearray(data)
    first = data.index(b"\xff\xda") + 14 if draw.random() < 0.9 else 2
    at = draw.randrange(first, len(data) - 2)
    match draw.randrange(8):
        case 0:  # a bit
            changed[at] ^= 1 << draw.randrange(8)
        case 1:  # bytes
            for place in (draw.randrange(first, len(data) - 2) for _ in range(draw.randint(1, 4))):
                changed[place] = draw.randrange(256)
        case 2:  # cut
            del changed[at:]
        case 3:  # cut, and ended
            changed[at:-2] = b""
        case 4:  # some bytes more
            changed[at:at] = draw.randbytes(draw.randint(1, 4))
        case 5:  # some less
            del changed[at : min(len(data) - 2, at + draw.randint(1, 4))]
        case 6:  # the last bits
            changed[-3] ^= draw.randrange(1, 256)
        case 7:  # bytes behind the codes, or behind the file
            place = len(data) - draw.choice((0, 2))
            changed[place:place] = draw.randbytes(draw.randint(1, 9))
    return bytes(changed)


def small(source: Image.Image, draw: random.Random) -> Image.Image:
    """A part of an image, of 17 to 98 pixels."""
    width, height = draw.randint(17, 98), draw.randint(17, 70)
    left, top = draw.randint(0, source.width - width), draw.randint(0, source.height - height)
    return source.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, **options: Any) -> bytes:
    """A JPEG of an image."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def _sources() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.iterdir()) if path.suffix != ".md"]

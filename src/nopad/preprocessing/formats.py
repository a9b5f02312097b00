"""The image formats that are read, and how a file of one is opened."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image, UnidentifiedImageError

from nopad.extras import install

FORMATS = frozenset(
    "AVIF BMP CUR DDS DIB GIF HEIF ICNS ICO JPEG JPEG2000 JXL MPO PCX PNG PPM PSD QOI SGI TGA TIFF WEBP XBM".split()  # noqa: SIM905
)
"""Pillow's names of the formats that are read: none that opens another file or starts a program, as EPS does."""

_SUFFIXES_OF_ADDITIONS = frozenset((".heic", ".heif", ".hif", ".avif", ".jxl"))
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
_JPEG_XL_MAGIC = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def open_image(data: bytes) -> Image.Image:
    """Open an image of one of `FORMATS`; nothing is decoded yet.

    Raises:
        UnidentifiedImageError: another format, or one that this installation does not read.
        Other errors of Pillow's readers: a damaged file.
    """
    file = io.BytesIO(data)
    if _format_of_brands(data) == "HEIF":
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            raise UnidentifiedImageError(f"HEIC needs pillow-heif: {install('heic')}") from error
        return HeifImageFile(file)
    try:
        return Image.open(file, formats=readable_formats())
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(_why_unidentified(data)) from error


def _why_unidentified(data: bytes) -> str:
    if _format_of_brands(data) == "AVIF":
        needs = f"AVIF needs Pillow 11.3 or newer: {install('heic')}"
        return "truncated or damaged; get the file again" if "AVIF" in readable_formats() else needs
    if data.startswith(_JPEG_XL_MAGIC):
        return "JPEG XL is not read; convert it to PNG or JPEG"
    return "not an image that Pillow can read; expected JPEG, PNG, WebP or the like"


def _format_of_brands(data: bytes) -> str | None:
    """`"AVIF"` or `"HEIF"` by the brands in the first box, `None` for any other file."""
    if data[4:8] != b"ftyp":
        return None
    end = int.from_bytes(data[:4], "big")
    brands = {data[8:12], *(data[i : i + 4] for i in range(16, min(end, 256), 4))}
    if brands & _AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if brands & _HEIF_BRANDS else None


@cache
def readable_formats() -> tuple[str, ...]:
    """The `FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(sorted(FORMATS & Image.OPEN.keys()))


VIDEO_SUFFIXES = frozenset((".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg"))


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of `FORMATS`, also where this Pillow lacks one, so that such files fail one by one and are seen."""
    registered = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
    return frozenset(registered | _SUFFIXES_OF_ADDITIONS)

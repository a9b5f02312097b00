"""Images from files to 8-bit RGB pixels: decode, orientation, colour."""

from __future__ import annotations

import logging
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from nopad.preprocessing.file_structure import MAX_SCANS, START_OF_SCAN, count_scans, is_cut_short, without_metadata
from nopad.preprocessing.files import read_regular, why
from nopad.preprocessing.formats import open_image
from nopad.preprocessing.limits import MAX_PIXELS
from nopad.storage.errors import unusable_store

try:  # libjpeg-turbo, twice as fast as Pillow's way from a JPEG to an array, the same bits
    import simplejpeg
except ImportError:
    simplejpeg = None

logger = logging.getLogger(__name__)

Source = str | Path | bytes | Image.Image | np.ndarray | Tensor
"""A path, a file's bytes, a PIL image, a uint8 array `(H, W)` or `(H, W, 3 | 4)`, a uint8 tensor `(3, H, W)`."""

# EXIF tag 0x0112 as the turn that undoes it.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError)
DAMAGE += (RuntimeError, AssertionError, struct.error, zlib.error)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used.

    Attributes:
        source: the image's name, for the message.
        reason: why, and what to do.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source = source
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class UnreachableError(ImageError):
    """An image of which nothing is known: its disk, mount or server failed, also when it was tried again."""


class RefusedError(UnreachableError):
    """An image of which nothing is known: its store refuses access, see `UnusableStoreError`."""


def unreachable_error(source: str, reason: str, cause: BaseException) -> UnreachableError:
    """The error of an image that could not be reached for a cause."""
    kind = UnreachableError if unusable_store(cause) is None else RefusedError
    return kind(source, f"unreachable: {reason}")


def load_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image to upright RGB.

    EXIF orientation is applied, alpha is composed on white (but for one that is zero throughout, which has no meaning),
    16-bit grey becomes 8-bit (divided by 257), an animation gives its first frame. Colour profiles are not applied, as
    in the original processors. Metadata that is damaged or too large is ignored. A PIL image is decoded by Pillow: at
    the frame where it stands, in the size of its `draft`, with all edits.

    Args:
        source: see `Source`.
        max_pixels: refuse a file or PIL image of more pixels, read from its header before anything is decoded.

    Returns:
        uint8 `(3, H, W)`, for most sources a channels-last view.

    Raises:
        ImageError: a file that is missing, no image of `formats.FORMATS`, truncated or damaged, too many pixels, a
            JPEG of too many scans, or an array of another dtype or shape.
    """
    if isinstance(source, Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] != 3 or 0 in source.shape:
            got = f"{source.dtype} {tuple(source.shape)}"
            raise ImageError("tensor", f"expected torch.uint8 (3, H, W) with values 0..255, got {got}")
        return source
    name = _name(source)
    if isinstance(source, np.ndarray):
        channels = source.shape[2] if source.ndim == 3 else 1
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in source.shape:
            expected = "uint8 (H, W), (H, W, 3) or (H, W, 4) with values 0..255"
            raise ImageError(name, f"expected {expected}; channels first goes in as a torch tensor")
        source = source[:, :, 0] if source.ndim == 3 and channels == 1 else source
        return as_tensor(_to_rgb(Image.fromarray(source), name))
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise ImageError(name, "expected a path, bytes, a PIL image, a uint8 array or a uint8 tensor")
    try:
        if isinstance(source, Image.Image):
            return _decode(source, name, max_pixels)
        return _decode_file(source if isinstance(source, bytes) else _read(source, name), name, max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, str(error)) from error
    except BOMB as error:
        raise ImageError(name, f"{error} (max_pixels {max_pixels}, PIL.Image.MAX_IMAGE_PIXELS below it)") from error
    except DAMAGE as error:
        message = f"{type(error).__name__}: {error}".strip().removesuffix(":")
        raise ImageError(name, f"truncated or damaged ({message}); get the file again") from error


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header of an encoded image, `None` where it cannot be read."""
    measured = measure_image(data)
    return None if measured is None else measured[:2]


def measure_image(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and the bytes that decoding takes, by the header; `None` where that cannot be read.

    Measured as peak resident memory on images of 24 megapixels: a colour JPEG goes straight to its array; what Pillow
    decodes stands there as Pillow's image, as RGB and as an array, for some formats beside the whole file decoded.
    """
    try:
        with open_image(data) as image:
            is_direct = simplejpeg is not None and image.format in ("JPEG", "MPO") and image.mode == "RGB"
            return image.width, image.height, image.width * image.height * (10 if is_direct else 24)
    except (*DAMAGE, *BOMB, ImageError):
        pixels_alone = without_metadata(data)
        return None if pixels_alone in (None, data) else measure_image(pixels_alone)


def _read(path: str | Path, name: str) -> bytes:
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:
        raise ImageError(name, f"cannot be opened: {why(error)}") from error


def _name(source: Any) -> str:
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image {source.mode} {source.width}×{source.height}"
    return f"{source.dtype} array {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__


@cache
def _warn_of_lax_pillow() -> None:
    logger.warning("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: Pillow fills truncated images up without an error")


def _decode_file(data: bytes, name: str, max_pixels: int) -> Tensor:
    try:
        return _decode_once(data, name, max_pixels)
    except ImageError:
        raise
    except DAMAGE:
        pixels_alone = without_metadata(data)
        if pixels_alone is None:
            raise
        return _decode_once(pixels_alone, name, max_pixels)


def _decode_once(data: bytes, name: str, max_pixels: int) -> Tensor:
    with open_image(data) as image:
        return _decode(image, name, max_pixels, data)


def _decode(image: Image.Image, name: str, max_pixels: int, data: bytes | None = None) -> Tensor:
    """Decode an image that was opened, from `data` or by the caller of `load_image`."""
    if image.format == "EPS":  # opened by the caller; loading it starts Ghostscript
        raise ImageError(name, "EPS is drawn by another program, which is not started; hand in image.convert('RGB')")
    _check_size(image, name, max_pixels)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        _warn_of_lax_pillow()
    if data is not None and is_cut_short(data, image.format):
        raise ImageError(name, "truncated: an animation whose last frame is not whole; get the file again")
    rgb = None if data is None else _decode_jpeg(image, data, name)
    if rgb is None:
        image.load()
        _check_size(image, name, max_pixels)  # of an ICO the header of the picture inside counts
        rgb = _to_rgb(image, name)
    turn = UPRIGHT.get(orientation(image))  # after load(), which turns some TIFFs itself
    if turn is not None:
        rgb = (Image.fromarray(rgb) if isinstance(rgb, np.ndarray) else rgb).transpose(turn)
    return as_tensor(rgb)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ImageError(name, f"{width}×{height} is {width * height} pixels, expected 1 to max_pixels {max_pixels}")


def _decode_jpeg(image: Image.Image, data: bytes, name: str) -> np.ndarray | None:
    """A colour JPEG as RGB; `None` where Pillow has to decide."""
    if image.format not in ("JPEG", "MPO"):
        return None
    # The bytes of the marker are counted fast, and never too few: only then `count_scans` looks at each marker.
    if data.count(START_OF_SCAN) > MAX_SCANS and (scans := count_scans(data)) > MAX_SCANS:
        raise ImageError(name, f"a JPEG of {scans} scans, expected at most {MAX_SCANS}; save it again")
    if simplejpeg is None or image.mode != "RGB":
        return None
    try:
        # Strict: otherwise a truncated file passes, its rest grey. What is refused here Pillow may still read.
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where the EXIF is damaged: it is no reason to lose the pixels."""
    try:
        return image.getexif().get(0x0112, 1)
    except DAMAGE as error:
        logger.debug("EXIF that cannot be read is ignored: %s", error)
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(name, "float pixels (mode F) have no known range; scale them to 0..255 and convert to mode L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(name, f"integer grey, expected 0..65535, got {values.min()}..{values.max()}")
        transparent = values == image.info.get("transparency", -1)
        if not transparent.all():
            values[transparent] = 65535
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[1]:  # zero throughout is a fourth byte without meaning, as in some BMPs
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def as_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """RGB pixels `(H, W, 3)` as `(3, H, W)`; an array's memory is shared."""
    return torch.from_numpy(image if isinstance(image, np.ndarray) else np.array(image)).permute(2, 0, 1)

"""When and where a photo was taken, by its EXIF."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from nopad.preprocessing.decode import DAMAGE, ImageError
from nopad.preprocessing.formats import open_image

TAKEN, LATITUDE, LONGITUDE = "taken", "latitude", "longitude"
_EXIF, _GPS = 0x8769, 0x8825
_ORIGINAL, _DIGITIZED = 0x9003, 0x9004


def read_exif(data: bytes) -> dict[str, str | float]:
    """Fields of the EXIF of an encoded image, as JSON.

    Returns:
        Some of `taken`, as `2024-05-01T12:30:00` by the camera's clock, whose time zone is rarely there; `latitude` and
        `longitude` in degrees, north and east above 0. What is missing or damaged is left out.
    """
    try:
        with open_image(data) as image:
            exif = image.getexif()
            times, place = dict(exif.get_ifd(_EXIF)), dict(exif.get_ifd(_GPS))
    except (*DAMAGE, ImageError):
        return {}
    taken = _time(times.get(_ORIGINAL)) or _time(times.get(_DIGITIZED))
    latitude, longitude = _degrees(place, 1, "NS", 90), _degrees(place, 3, "EW", 180)
    fields: dict[str, str | float] = {} if taken is None else {TAKEN: taken}
    if latitude is not None and longitude is not None:
        fields |= {LATITUDE: latitude, LONGITUDE: longitude}
    return fields


def _time(value: Any) -> str | None:
    try:
        return datetime.strptime(str(value).strip("\0 "), "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return None


def _degrees(place: Mapping[int, Any], tag: int, directions: str, limit: int) -> float | None:
    """Degrees, minutes and seconds at `tag + 1`, on the side of zero that `tag` names."""
    direction = str(place.get(tag, "")).strip("\0 ").upper()
    try:
        degrees, minutes, seconds = (float(value) for value in place[tag + 1])
    except DAMAGE:
        return None
    angle = degrees + minutes / 60 + seconds / 3600
    if len(direction) != 1 or direction not in directions or not math.isfinite(angle) or not 0 <= angle <= limit:
        return None
    return -angle if direction == directions[1] else angle

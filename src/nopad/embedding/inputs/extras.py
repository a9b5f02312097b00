"""Columns of what decode processes find in a file beside its pixels: its EXIF and a thumbnail."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa

from nopad.preprocessing.exif import LATITUDE, LONGITUDE, TAKEN
from nopad.preprocessing.thumbnails import MAX_BYTES, is_thumbnail

THUMBNAIL = "thumbnail"
EXIF = (TAKEN, LATITUDE, LONGITUDE)
TYPES = {
    TAKEN: pa.timestamp("s"),
    LATITUDE: pa.float64(),
    LONGITUDE: pa.float64(),
    THUMBNAIL: pa.binary(),
}
"""The columns, by name."""
_LIMITS = {LATITUDE: 90, LONGITUDE: 180}


def values_of(extras: Mapping[str, Any] | None, names: Sequence[str]) -> tuple[Any, ...]:
    """The values of columns in what a decode process has sent, which is not trusted; `None` for what is none."""
    return tuple(_value(name, (extras or {}).get(name)) for name in names)


def _value(name: str, value: Any) -> Any:
    if name in _LIMITS:
        is_number = type(value) in (int, float) and math.isfinite(value) and abs(value) <= _LIMITS[name]
        return float(value) if is_number else None
    if not isinstance(value, str) or len(value) > 2 * MAX_BYTES:
        return None
    try:
        if name == TAKEN:
            return datetime.fromisoformat(value).replace(tzinfo=None, microsecond=0)
        data = base64.b64decode(value, validate=True)
    except ValueError:
        return None
    return data if is_thumbnail(data) else None

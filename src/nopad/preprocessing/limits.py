"""Limits and defaults of decoding that several packages share; nothing heavy is imported here."""

from typing import Literal

MaxPatches = int | Literal["auto"] | None
"""Most patches of an image: `"auto"` is `MAX_PATCHES` if the model's rule has no limit, `None` is the rule's alone."""

MAX_PIXELS = 178_956_970
"""Largest image that is decoded or made by a resize, in pixels: the number at which Pillow refuses to open one."""

MAX_PATCHES = 4096
"""Default limit on an image's patches in bulk, for models without one: a photo of 12 megapixels would make 62,208 of
14 × 14 pixels, whose attention costs 230 times as much as that of 4,096."""

MAX_BYTES = 1 << 31
"""Largest encoded file that is read, in bytes."""

INPUT_TIMEOUT_SECONDS = 60.0
"""Default time limit for decoding one input."""

NUM_FRAMES = 8
"""Default number of frames that are taken of a video."""

THUMBNAIL_SIDES = (16, 512)
"""Least and most pixels of the longer side of thumbnails in a table."""

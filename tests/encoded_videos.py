"""Videos of grey frames, and which of them were read."""

import io
from fractions import Fraction

import av
import numpy as np
from torch import Tensor


def encoded_video(
    count: int,
    format: str = "mp4",
    codec: str = "libx264",
    gop: int = 6,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    noise: bool = False,
    pixel_ratio: Fraction | None = None,
    encoder: dict[str, str] | None = None,
) -> bytes:
    """Grey frames whose level tells their number, with a dark top left quarter."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with av.open(buffer, "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 32
        stream.pix_fmt = {"gif": "rgb8", "apng": "rgb24", "zmbv": "bgr0"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.options = encoder or {}
        if pixel_ratio:
            stream.codec_context.sample_aspect_ratio = pixel_ratio
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            array = np.full((32, 64, 3), level(i), np.uint8)
            array[:16, :32] = 0
            array = rng.integers(0, 256, array.shape, np.uint8) if noise else array
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def level(index: int) -> int:
    return 60 + 4 * index


def numbers(frames: Tensor) -> list[int]:
    return [round((frame[:, -8:, -8:].float().mean().item() - 60) / 4) for frame in frames]

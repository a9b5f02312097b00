"""Small pictures on disk, no two alike."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """RGB noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_photos(folder: Path, number: int, *, start: int = 0, scale: int = 1) -> Path:
    """Write PNGs named by their number, of sides from 4 to 39 pixels times `scale`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + number):
        height, width = np.random.default_rng(index).integers(4, 40, 2) * scale
        Image.fromarray(noise(index, height, width)).save(folder / f"{index:03}.png", compress_level=1)
    return folder


def write_video(path: Path, frames: int) -> Path:
    """Write an mp4 of so many different grey frames of 64 × 32 pixels."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for level in np.linspace(40, 220, frames):
            frame = np.full((32, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path

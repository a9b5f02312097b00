"""The program of the processes that decode untrusted files."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor

from nopad.pipeline.forked import (
    HEADROOM_BYTES,
    address_space,
    answer,
    is_out_of_memory,
    limit_address_space,
    send_bytes,
)
from nopad.pipeline.image_processor import ImageProcessor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import MAX_BYTES

LARGE_FILE_BYTES = 1 << 26
"""A file of so many bytes is read once there is memory for it; of smaller ones each process may hold one."""


class Decoder(Protocol):
    """From the bytes or the name of an untrusted file to pixels; picklable."""

    def size(self, source: Any, /) -> int:
        """How many bytes `read` takes into memory."""
        ...

    def read(self, source: Any, /) -> bytes | str:
        """Read the file, or whatever `source` names: bytes, or the name of a file that is decoded where it is."""
        ...

    def measure(self, data: Any, /) -> tuple[int, int, int]:
        """By the header alone: frames, pixels of all of them, and about how many bytes decoding takes."""
        ...

    def __call__(self, data: Any, /) -> Tensor:
        """Decode to uint8 `(3, H, W)` or `(frames, 3, H, W)`."""
        ...

    def extras(self, data: Any, pixels: Tensor, /) -> dict[str, Any]:
        """What else is kept of a file beside its patches, as JSON of less than a megabyte."""
        ...


@dataclass(frozen=True)
class DecodeProgram:
    """Answers each file with the bytes that it needs, and once they are granted with its patches, or with an error.

    A large file is answered with its own size first, and read once that is granted.
    """

    decoder: Decoder
    image_processor: ImageProcessor

    def prepare(self) -> None:
        """Import what the image processor needs."""
        self.image_processor(torch.zeros(3, 64, 64, dtype=torch.uint8))

    def serve(self, connection: Connection) -> None:
        """See `Program.serve`."""
        start = address_space()
        while True:
            limit_address_space(start + HEADROOM_BYTES + 2 * MAX_BYTES)  # for a file that is sent
            try:
                source = connection.recv()
                self._serve_one(connection, source, start + HEADROOM_BYTES)
            except ImageError as error:
                answer(connection, error=error.reason)
            except (EOFError, ConnectionError):
                return
            except Exception as error:
                if is_out_of_memory(error):
                    answer(connection, error="decoding it takes more memory than its header says")
                else:
                    summary = f"unexpected {type(error).__name__}: {error}"
                    answer(connection, error=summary[:1000], traceback=traceback.format_exc()[-10_000:])

    def _serve_one(self, connection: Connection, source: Any, limit: int) -> None:
        size = self.decoder.size(source)
        if size >= LARGE_FILE_BYTES:
            answer(connection, reading=size)
            connection.recv()
        limit_address_space(limit + 2 * size)
        data = self.decoder.read(source)
        limit += 2 * len(data)
        limit_address_space(limit)
        answer(connection, bytes=len(data) + self.image_processor.peak_bytes(*self.decoder.measure(data)))
        limit_address_space(limit + connection.recv())
        pixels = self.decoder(data)
        image, extras = self.image_processor(pixels), self.decoder.extras(data, pixels)
        patches, sides = image.patches.contiguous(), {"width": image.width, "height": image.height}
        answer(connection, shape=patches.shape, grid=image.grid, extras=extras, **sides)
        send_bytes(connection, patches.view(-1).view(torch.uint8).numpy().data)

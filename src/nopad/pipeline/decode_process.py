"""The program of the processes that decode untrusted files."""

from __future__ import annotations

import traceback
from collections.abc import Callable
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
)
from nopad.pipeline.image_processor import ImageProcessor
from nopad.preprocessing.decode import ImageError, UnreachableError
from nopad.preprocessing.jpegs import CheckedJpeg, load_decoders, upright, upright_size
from nopad.preprocessing.limits import MAX_BYTES

LARGE_FILE_BYTES = 1 << 26
"""A file of so many bytes is read once there is memory for it; of smaller ones each process may hold one."""


class Decoder(Protocol):
    """Makes pixels of the bytes or the name of an untrusted file; picklable."""

    def is_quick(self, source: Any, /) -> bool:
        """Whether a file of its kind is decoded in an instant; then several are sent at once."""
        ...

    def size(self, source: Any, /) -> int:
        """How many bytes `read` takes into memory."""
        ...

    def read(self, source: Any, /) -> bytes | str:
        """Read the file, or whatever `source` names: bytes, or the name of a file that is decoded where it is.

        Raises:
            UnreachableError: it cannot be reached now.
        """
        ...

    def measure(self, data: Any, /) -> tuple[int, int, int]:
        """Frames, pixels of all of them, and about how many bytes decoding takes, by the header alone."""
        ...

    def __call__(self, data: Any, /) -> Tensor:
        """Decode to uint8 `(3, H, W)` or `(frames, 3, H, W)`."""
        ...

    def scaled(self, data: Any, min_size: Callable[[int, int], tuple[int, int]], /) -> tuple[Tensor, tuple[int, int]]:
        """Decode, a JPEG perhaps at a fraction of its size; also height and width of the whole image."""
        ...

    def check_jpeg(self, data: Any, /) -> CheckedJpeg | None:
        """What a GPU needs to decode it; `None` for anything that is decoded here."""
        ...

    def extras(self, data: Any, pixels: Tensor | None, /) -> dict[str, Any]:
        """Values of a file that are kept beside its patches, as JSON of less than a megabyte.

        Args:
            pixels: upright `(3, H, W)`, maybe at a fraction of the size; `None` where `check_jpeg` left them out.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Files that are decoded without another message, and answered all at once.

    Attributes:
        allowance: bytes that each may take; one that needs more is answered with `"alone"`.
    """

    sources: tuple[Any, ...]
    allowance: int


@dataclass(frozen=True)
class DecodeProgram:
    """Answers a file with the bytes that it needs, and once they are granted with its patches, or with an error.

    A large file is answered with its own size first, and read once that is granted; once it is, `"read"` is answered. A
    `Batch` is answered at once. An error is `"unreachable"` where it is an `UnreachableError`.

    Attributes:
        keep_jpegs: answer with the file itself where it is a JPEG that a GPU decodes.
        scale_jpegs: decode JPEGs at a fraction of their size where that is enough.
    """

    decoder: Decoder
    image_processor: ImageProcessor
    keep_jpegs: bool = False
    scale_jpegs: bool = False

    def prepare(self) -> None:
        """Load what decoding and the image processor need, which each process would do at its first file."""
        load_decoders()
        self.image_processor(self.image_processor.blank_image)

    def serve(self, connection: Connection) -> None:
        """See `Program.serve`."""
        start = address_space()
        while True:
            limit_address_space(start + HEADROOM_BYTES + 2 * MAX_BYTES)  # for a file that is sent
            try:
                request = connection.recv()
                if isinstance(request, Batch):
                    self._serve_batch(connection, request, start + HEADROOM_BYTES)
                else:
                    self._serve_one(connection, request, start + HEADROOM_BYTES)
            except (EOFError, ConnectionError):
                return
            except Exception as error:
                answer(connection, **_described(error))

    def _serve_one(self, connection: Connection, source: Any, limit: int) -> None:
        size = self.decoder.size(source)
        if size >= LARGE_FILE_BYTES:
            answer(connection, reading=size)
            connection.recv()
        limit_address_space(limit + 2 * size)
        data = self.decoder.read(source)
        answer(connection, read=True)
        limit += 2 * len(data)
        limit_address_space(limit)
        answer(connection, bytes=self._peak_bytes(data))
        limit_address_space(limit + connection.recv())
        fields, patches = self._keep(data) or self._decode(data)
        answer(connection, patches, **fields)

    def _serve_batch(self, connection: Connection, batch: Batch, limit: int) -> None:
        answers: list[dict[str, Any]] = []
        parts: list[memoryview] = []
        for source in batch.sources:
            try:
                fields, part = self._decode_within(batch.allowance, source, limit)
            except Exception as error:
                fields, part = _described(error), None
            answers.append(fields)
            if part is not None:
                parts.append(part)
                limit += part.nbytes
        answer(connection, *parts, answers=answers)

    def _decode_within(self, allowance: int, source: Any, limit: int) -> tuple[dict[str, Any], memoryview | None]:
        size = self.decoder.size(source)
        if size > allowance:
            return {"alone": True}, None
        limit_address_space(limit + allowance)
        data = self.decoder.read(source)
        limit_address_space(limit + 2 * len(data) + allowance)
        if (jpeg := self._keep(data)) is not None:  # at an eighth of its size it takes little
            return jpeg
        if self._peak_bytes(data) > allowance:
            return {"alone": True}, None
        return self._decode(data)

    def _peak_bytes(self, data: bytes | str) -> int:
        return len(data) + self.image_processor.peak_bytes(*self.decoder.measure(data))

    def _keep(self, data: bytes | str) -> tuple[dict[str, Any], memoryview] | None:
        """A JPEG that is decoded elsewhere, and what it is; `None` for what is decoded here."""
        if not self.keep_jpegs or (jpeg := self.decoder.check_jpeg(data)) is None:
            return None
        assert isinstance(data, bytes)
        height, width = upright_size(jpeg.width, jpeg.height, jpeg.orientation)
        small = None if jpeg.small is None else upright(jpeg.small, jpeg.orientation)
        extras = self.decoder.extras(data, small)
        fields = {"jpeg": len(data), "orientation": jpeg.orientation, "width": width, "height": height}
        return {**fields, "grid": self.image_processor.grid_of(height, width), "extras": extras}, memoryview(data)

    def _decode(self, data: bytes | str) -> tuple[dict[str, Any], memoryview]:
        """Patches as plain bytes, and what they are."""
        size = None
        if self.scale_jpegs:
            pixels, size = self.decoder.scaled(data, self.image_processor.resized_size)
        else:
            pixels = self.decoder(data)
        image, extras = self.image_processor(pixels, size), self.decoder.extras(data, pixels)
        patches = image.data.contiguous()
        fields = {"shape": patches.shape, "grid": image.grid, "width": image.width, "height": image.height}
        return {**fields, "extras": extras}, patches.view(-1).view(torch.uint8).numpy().data


def _described(error: Exception) -> dict[str, Any]:
    """An answer that states what went wrong."""
    if isinstance(error, UnreachableError):
        return {"error": error.reason, "unreachable": True}
    if isinstance(error, ImageError):
        return {"error": error.reason}
    if is_out_of_memory(error):
        return {"error": "decoding it takes more memory than its header says"}
    summary = f"unexpected {type(error).__name__}: {error}"
    return {"error": summary[:1000], "traceback": traceback.format_exc()[-10_000:]}

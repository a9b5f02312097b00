"""The connection to one decode process."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch

from nopad.pipeline.channel import Channel, count_in
from nopad.pipeline.decode_process import Batch, DecodeProgram
from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.memory import MemoryReservation
from nopad.pipeline.process_server import Process
from nopad.preprocessing.jpegs import simplejpeg, upright_size

NO_EVENTS = 0
"""Yielded in place of `selectors.EVENT_READ` or `EVENT_WRITE` while there is no memory: no event of the connection ends
that wait, but `notify`."""

Answer = PreparedImage | dict[str, Any]
"""An image, or what went wrong, as the `"error"` and perhaps the `"traceback"` or `"unreachable"`; of a batch also
`"alone"`, which is an image that needs more than its allowance."""


class DecodeChannel(Channel):
    """One process, which decodes one file after another.

    Args:
        process: runs the program.
        program: says what it may answer.

    Attributes:
        deadline: when the process is to be ended, by the monotonic clock.
        is_reading: whether it has not read the file yet that it was given alone.
    """

    def __init__(self, process: Process, program: DecodeProgram) -> None:
        super().__init__(process)
        self._program = program
        self.deadline = float("inf")  # by the monotonic clock
        self.is_reading = False
        self._start = self._waited = 0.0

    def prepare(
        self, data: Any, reservation: MemoryReservation, timeout: float | None, notify: Callable[[], None]
    ) -> Generator[int, None, Answer]:
        """Send a file and receive its patches; yields the events of the connection to wait for, or `NO_EVENTS`.

        Args:
            data: the file, as the decoder takes it.
            reservation: for the memory that it takes.
            timeout: seconds until `deadline`, which starts anew once patches come.
            notify: called when there may be memory.

        Raises:
            EOFError, OSError, ValueError, LookupError, TypeError: the process died, or answers nonsense.
            ImageError: no memory for it.
        """
        self._start, self._waited = time.monotonic(), 0.0
        self._allow(timeout)
        self.is_reading = True
        yield from self.send(data)
        answer = yield from self.receive()
        if "reading" in answer:
            size = count_in(answer, "reading")
            yield from self._wait(lambda: reservation.try_hold(size, notify))
            yield from self.send(size)
            answer = yield from self.receive()
        if "read" in answer:
            self.is_reading = False
            answer = yield from self.receive()
        if "error" in answer:
            return answer
        size = count_in(answer, "bytes")
        total = size + (len(data) if isinstance(data, bytes) else 0)  # which this process holds, too
        yield from self._wait(lambda: reservation.try_reserve(total, notify))
        yield from self.send(size)
        answer = yield from self.receive()
        if "error" in answer:
            return answer
        image = self._empty_image(answer, size)
        self._allow(timeout)
        yield from self.fill([_bytes_of(image)])
        _check(image)
        return image

    def prepare_batch(
        self,
        files: Sequence[Any],
        reservations: Sequence[MemoryReservation],
        allowance: int,
        timeout: float | None,
        notify: Callable[[], None],
    ) -> Generator[int, None, list[Answer]]:
        """Send several files and receive the patches of all at once; otherwise as `prepare`.

        Args:
            allowance: bytes that each may take.
            timeout: seconds for all of them.
        """
        self._start, self._waited = time.monotonic(), 0.0
        self._allow(timeout)
        self.is_reading = False
        budget = reservations[0].budget
        yield from self._wait(lambda: budget.try_reserve_all(reservations, allowance, notify))
        yield from self.send(Batch(tuple(files), allowance))
        answers = (yield from self.receive(max_answers=len(files)))["answers"]
        if len(answers) != len(files) or not all(isinstance(fields, dict) for fields in answers):
            raise ValueError(f"got {len(answers)} answers to {len(files)} files, expected an object for each")
        images = [
            fields if "error" in fields or "alone" in fields else self._empty_image(fields, allowance)
            for fields in answers
        ]
        self._allow(timeout)
        prepared = [image for image in images if isinstance(image, PreparedImage)]
        yield from self.fill(list(map(_bytes_of, prepared)))
        for image in prepared:
            _check(image)
        return images

    def _empty_image(self, answer: dict[str, Any], size: int) -> PreparedImage:
        if self._program.keep_jpegs and "jpeg" in answer:
            return self._empty_jpeg(answer, size)
        rows, columns = answer["shape"]
        t, h, w = answer["grid"]
        width, height = answer["width"], answer["height"]
        numbers = (rows, columns, t, h, w, width, height)
        if not all(type(number) is int and number > 0 for number in numbers) or t * h * w != rows:
            raise ValueError(f"got patches of {rows}×{columns} in a grid of {t}×{h}×{w} for {width}×{height} pixels")
        if rows * columns * self._program.image_processor.dtype.itemsize > size:
            raise ValueError(f"got patches of {rows}×{columns}, expected at most {size} bytes")
        if not isinstance(extras := answer["extras"], dict):
            raise ValueError(f"got extras {type(extras).__name__}, expected an object")
        data = torch.empty(rows, columns, dtype=self._program.image_processor.dtype)
        return PreparedImage(data, (t, h, w), width, height, extras)

    def _empty_jpeg(self, answer: dict[str, Any], size: int) -> PreparedImage:
        numbers = (answer["jpeg"], *answer["grid"], answer["width"], answer["height"], answer["orientation"])
        if not all(type(number) is int and number > 0 for number in numbers) or len(numbers) != 7:
            raise ValueError(f"got a JPEG of {numbers}")
        if answer["jpeg"] > size or answer["orientation"] > 8 or not isinstance(answer["extras"], dict):
            raise ValueError(f"got a JPEG of {answer['jpeg']} bytes and orientation {answer['orientation']}")
        if list(self._program.image_processor.grid_of(answer["height"], answer["width"])) != answer["grid"]:
            raise ValueError(f"got a grid of {answer['grid']} for {answer['width']}×{answer['height']} pixels")
        data = torch.from_numpy(np.empty(answer["jpeg"], np.uint8))
        sides = answer["width"], answer["height"], answer["extras"]
        return PreparedImage(data, tuple(answer["grid"]), *sides, orientation=answer["orientation"])

    def seconds(self) -> float:
        """Seconds that the process has worked on its file until now, without waiting for memory."""
        return time.monotonic() - self._start - self._waited

    def _allow(self, seconds: float | None) -> None:
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds

    def _wait(self, is_granted: Callable[[], bool]) -> Generator[int, None, None]:
        start = time.monotonic()
        while not is_granted():
            yield NO_EVENTS
        waited = time.monotonic() - start
        self._waited += waited
        self.deadline += waited


def _check(image: PreparedImage) -> None:
    """Check that a JPEG is as large as its process states.

    Raises:
        ValueError: it is not, or it is none.
    """
    if image.orientation is None:
        return
    header: Any = simplejpeg.decode_jpeg_header(image.data.numpy())
    height, width = header[:2]
    if upright_size(width, height, image.orientation) != (image.height, image.width):
        raise ValueError(f"got a JPEG of {width}×{height} pixels, expected {image.width}×{image.height} upright")


def _bytes_of(image: PreparedImage) -> memoryview:
    data = image.data
    return (data if data.dtype == torch.uint8 else data.view(torch.uint8)).numpy().data.cast("B")

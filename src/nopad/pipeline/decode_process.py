"""The program of the processes that decode untrusted files, and of the server that forks them.

A decoder may loop, allocate without end or crash; a thread cannot be stopped, a process can. The server computes
nothing itself, so it always answers.
"""

from __future__ import annotations

import array
import gc
import json
import os
import signal
import socket
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from nopad.pipeline.image_processor import ImageProcessor
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.limits import MAX_BYTES

HEADROOM_BYTES = 1 << 30
"""Address space that a process may take beyond what it starts with, the file, and what its header announces."""


class Decoder(Protocol):
    """From the bytes or the name of an untrusted file to pixels; picklable."""

    def read(self, source: Any, /) -> bytes | str:
        """Read the file, or whatever `source` names: bytes, or the name of a file that is decoded where it is."""
        ...

    def measure(self, data: Any, /) -> tuple[int, int, int]:
        """By the header alone: frames, pixels of all of them, and about how many bytes decoding takes."""
        ...

    def __call__(self, data: Any, /) -> Tensor:
        """Decode to uint8 `(3, H, W)` or `(frames, 3, H, W)`."""
        ...


def main(descriptor: int) -> None:
    """Fork a process for each decoder, image processor and socket that comes over the control socket."""
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # the decoder has a limit of its own
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, whose rows have the reason
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that end are reaped by the system
    control = socket.socket(fileno=descriptor)
    messages = Connection(os.dup(descriptor))
    server = os.getpid()
    while True:
        try:
            decoder, image_processor = messages.recv()
        except EOFError:
            return
        image_processor(torch.zeros(3, 64, 64, dtype=torch.uint8))  # imports what it needs, once for all forks
        _, ancillary, _, _ = control.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))
        connection = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            control.close()
            messages.close()
            _end_with(server)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of damaged files; rows have the reason
            serve(Connection(connection), decoder, image_processor)
            os._exit(0)
        os.close(connection)
        control.sendall(pid.to_bytes(8, sys.byteorder))


def serve(connection: Connection, decoder: Decoder, image_processor: ImageProcessor) -> None:
    """Answer each file with the bytes that it needs, and once they are granted with its patches, or with an error."""
    start = _address_space()
    while True:
        try:
            source = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            _limit(start + MAX_BYTES + HEADROOM_BYTES)
            data = decoder.read(source)
            headroom = HEADROOM_BYTES + 2 * len(data)
            _limit(start + headroom)
            _answer(connection, bytes=image_processor.peak_bytes(*decoder.measure(data)))
            _limit(start + headroom + connection.recv())
            image = image_processor(decoder(data))
            patches = image.patches.contiguous()
            _answer(connection, shape=patches.shape, grid=image.grid, width=image.width, height=image.height)
            _send(connection, patches.view(-1).view(torch.uint8).numpy().data)
            del data, image, patches
        except ImageError as error:
            _answer(connection, error=error.reason)
        except (EOFError, ConnectionError):
            return
        except Exception as error:
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch's own is a RuntimeError
                _answer(connection, error="decoding it takes more memory than its header says")
            else:
                summary = f"unexpected {type(error).__name__}: {error}"
                _answer(connection, error=summary[:1000], traceback=traceback.format_exc()[-10_000:])


def _answer(connection: Connection, **fields: Any) -> None:
    """Send JSON, which the pipeline reads without trust."""
    connection.send_bytes(json.dumps(fields).encode())


def _send(connection: Connection, data: memoryview) -> None:
    """Send plain bytes, as many as were announced."""
    while data.nbytes:
        data = data[os.write(connection.fileno(), data) :]


def _address_space() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return 0


def _limit(size: int) -> None:
    import resource

    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _end_with(parent: int) -> None:
    """End this process when its parent ends, also in the middle of a decoder."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(0)

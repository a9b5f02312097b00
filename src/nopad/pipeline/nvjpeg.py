"""NVIDIA's nvJPEG library with the JPEG engines of a GPU, by ctypes.

nvJPEG pipelines the images of a batch by default, and then each waits for all that the GPU computes. Without pipelining
it decodes at 0.9 of its speed while an encoder runs; nvImageCodec, which is made of nvJPEG, has no option for that.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p
from glob import glob
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from nopad.preprocessing.file_structure import START_OF_SCAN

_ENGINES = 3  # NVJPEG_BACKEND_HARDWARE
_INTERLEAVED_RGB = 5  # NVJPEG_OUTPUT_RGBI
_NO_PIPELINE, _FANCY_UPSAMPLING = 1, 1 << 5
_STATUS = (
    "success",
    "not initialised",
    "invalid parameter",
    "bad JPEG",
    "JPEG not supported",
    "out of memory",
    "execution failed",
    "architecture mismatch",
    "internal error",
    "implementation not supported",
    "incomplete bitstream",
)


class NvjpegError(RuntimeError):
    """nvJPEG is not there, has no engines here, or refuses a file."""


class _Image(ctypes.Structure):
    _fields_ = (("channel", c_void_p * 4), ("pitch", c_size_t * 4))


class Nvjpeg:
    """One decoder, for one call of `decode` at a time; `size` may be called from several threads, beside it.

    Its device is the one that is current where it is made.

    Raises:
        NvjpegError: the library is not there, or the GPU has no JPEG engine.
    """

    def __init__(self) -> None:
        self._library, self._quick = _load()
        self._handle, self._state, self._header = c_void_p(), c_void_p(), c_void_p()
        self._header_lock = threading.Lock()
        flags = c_uint(_NO_PIPELINE | _FANCY_UPSAMPLING)
        self._call("nvjpegCreateEx", _ENGINES, None, None, flags, byref(self._handle))
        self._call("nvjpegJpegStateCreate", self._handle, byref(self._state))
        self._call("nvjpegJpegStreamCreate", self._handle, byref(self._header))
        self._batch_size = 0

    def size(self, file: np.ndarray) -> tuple[int, int] | None:
        """Height and width of a file, by its header; `None` for one that the engines do not decode."""
        header, quick, supported = self._header, self._quick, c_int(-1)
        head = _header_size(file)
        width, height = c_uint(), c_uint()
        with self._header_lock:  # the interpreter's own is not given up for calls of microseconds, but between them
            if quick.nvjpegJpegStreamParseHeader(self._handle, c_void_p(file.ctypes.data), c_size_t(head), header):
                return None
            if quick.nvjpegDecodeBatchedSupported(self._handle, header, byref(supported)) or supported.value != 0:
                return None
            if quick.nvjpegJpegStreamGetFrameDimensions(header, byref(width), byref(height)):
                return None
        return height.value, width.value

    def decode(
        self, files: Sequence[np.ndarray], addresses: Sequence[int], pitches: Sequence[int], stream: int
    ) -> None:
        """Decode files that have a `size`.

        Args:
            addresses, pitches: where the pixels `(H, W, 3)` of each image go on the device, and the bytes of a row.
            stream: the CUDA stream in whose order they are written.

        Raises:
            NvjpegError: none of them may be used.
        """
        number = len(files)
        if not number:
            return
        if number != self._batch_size:
            self._batch_size = 0
            self._call("nvjpegDecodeBatchedInitialize", self._handle, self._state, number, 1, _INTERLEAVED_RGB)
            self._batch_size = number
        data = (c_void_p * number)(*(file.ctypes.data for file in files))
        lengths = (c_size_t * number)(*(file.size for file in files))
        images = (_Image * number)()
        for image, address, pitch in zip(images, addresses, pitches, strict=True):
            image.channel[0], image.pitch[0] = address, pitch
        self._call("nvjpegDecodeBatched", self._handle, self._state, data, lengths, images, c_void_p(stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            reason = _STATUS[status] if status < len(_STATUS) else f"status {status}"
            raise NvjpegError(f"nvJPEG: {name.removeprefix('nvjpeg')}: {reason}")


def _header_size(file: np.ndarray) -> int:
    """Bytes up to the first scan's data: nvJPEG would look through all of these, 0.1 ms for 150 kB."""
    for size in (1 << 12, file.size):
        start = file[:size].tobytes().find(START_OF_SCAN)
        if 0 <= start < file.size - 4:
            return min(file.size, start + 2 + int.from_bytes(file[start + 2 : start + 4].tobytes(), "big"))
    return file.size


def is_installed() -> bool:
    """Whether the library is there; it may be of another CUDA."""
    return bool(_paths())


def _paths() -> list[str]:
    """The libraries of NVIDIA's packages for Python, the newest first."""
    paths = [path for folder in _folders() for path in glob(f"{folder}/*/lib/libnvjpeg.so.*")]
    return sorted(paths, key=lambda path: int(Path(path).name.split(".")[2]), reverse=True)


def _folders() -> list[str]:
    spec = util.find_spec("nvidia")
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _load() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The library with and without giving up the interpreter's lock."""
    reason = "it is not installed"
    for path in _paths():
        try:
            return ctypes.CDLL(path), ctypes.PyDLL(path)
        except OSError as error:
            reason = str(error)
    raise NvjpegError(f"nvJPEG: {reason}")

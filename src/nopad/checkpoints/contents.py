"""Reads one file of a checkpoint, tensors or JSON; its headers cannot make reading cost more than its size warrants."""

from __future__ import annotations

import json
import os
import pickletools
import tarfile
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nopad.checkpoints.stored_tensor import StoredTensor
from nopad.json_files import MAX_JSON_BYTES
from nopad.local_paths import check_regular

PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
MAX_HEADER_BYTES = MAX_JSON_BYTES
"""Limit on the parts of a file that are parsed whole: the header of a safetensors file, the pickle in a `.pth` file."""

# Globals that a pickled dict of tensors refers to.
_TENSOR_GLOBALS = {
    "collections OrderedDict",
    *(f"torch._utils _rebuild_{what}" for what in ("tensor", "tensor_v2", "parameter")),
    *(
        f"torch {dtype}Storage"
        for dtype in ["Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]
    ),
}
_LEGACY_PICKLES = 5  # magic number, protocol, system, the tensors, and the keys of their storages


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a weights file: its tensors, by their stored names.

    Raises:
        ValueError: no file, of another kind, damaged, or with values that the file does not hold.
    """
    check_regular(path)
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix in PICKLE_SUFFIXES:
            return _read_pickle(path)
        raise ValueError(f"expected {', '.join(SUFFIXES)}, got {path.suffix!r}")
    except ValueError as error:
        raise ValueError(f"checkpoint file {str(path)!r}: {error}") from error


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(
                "expected safetensors, got a pointer of Git LFS; fetch the file itself with `git lfs pull`"
            )
        end = 8 + int.from_bytes(start[:8], "little")
        if end - 8 > MAX_HEADER_BYTES:
            raise ValueError(f"expected safetensors with a header of at most {MAX_HEADER_BYTES} bytes, got {end - 8}")
        header = (start + file.read(max(0, end - len(start))))[8:end]
    tensors = {}
    try:
        handle = safe_open(str(path), framework="pt")  # checks the header
        stored = json.loads(header)
        opened = _OpenFile(path) if hasattr(os, "preadv") else None  # Windows has none
        for name in handle.keys():  # noqa: SIM118 - the handle is no dict
            shape, dtype = tuple(handle.get_slice(name).get_shape()), handle.get_tensor(name).dtype
            copy = opened and partial(opened.copy, end + stored[name]["data_offsets"][0], shape, dtype)
            tensors[name] = StoredTensor(shape, dtype, lambda name=name: handle.get_tensor(name), copy)
    except SafetensorError as error:
        raise ValueError(f"expected safetensors, got {error}") from error
    return tensors


class _OpenFile:
    """A file that stays open as long as its tensors may be read: another may take its name meanwhile."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def copy(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values begin at byte `start`, read into memory of its own.

        A copy from the mapped file would need the file's pages in memory besides.

        Raises:
            ValueError: the file has been cut off since it was opened.
        """
        values = torch.empty(shape, dtype=dtype)
        rest = memoryview(values.view(-1).view(torch.uint8).numpy().data)
        while rest:
            count = os.preadv(self.descriptor, [rest], start)
            if not count:
                raise ValueError(f"expected {len(rest)} bytes more, from byte {start} on; the file has been cut off")
            start, rest = start + count, rest[count:]
        return values


def _read_pickle(path: Path) -> dict[str, StoredTensor]:
    try:
        zipped = zipfile.is_zipfile(path)
        others = sorted(set(_globals(path, zipped)) - _TENSOR_GLOBALS)
        if others:
            raise ValueError(f"{', '.join(others[:10])}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # junk can raise anything
        raise ValueError(f"expected tensors and nothing else, got {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        keys = list(content)[:10] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected a flat dict of tensors, got {keys!r:.200}")
    if not all(isinstance(name, str) for name in content):
        raise ValueError(f"expected strings as names, got {[n for n in content if not isinstance(n, str)][:10]!r:.200}")
    values, size = sum(value.numel() * value.element_size() for value in content.values()), path.stat().st_size
    if values > 2 * size:  # tensors may share values, or repeat them by a stride of 0
        raise ValueError(f"expected at most twice the file's {size} bytes as values, got {values}")
    return {name: StoredTensor(tuple(value.shape), value.dtype, lambda v=value: v) for name, value in content.items()}


def _globals(path: Path, zipped: bool) -> Iterator[str]:
    """Globals that the pickle of a file refers to, found without unpickling it.

    torch's unpickler refuses most harmful globals, but for example calls `bytearray` with any size.
    """
    if not zipped:
        with path.open("rb") as file:
            # torch tries to open it as a tar first, which takes time that grows with the square of the first header.
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
                raise ValueError("a tar, as torch wrote before 0.1")
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                yield from _globals_of_pickle(file)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("compressed entries, which torch does not write")
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):  # torch finds them in either case
                with archive.open(entry) as file:
                    yield from _globals_of_pickle(file)


class _ShortReads:
    """A file as pickletools reads it, which would allocate whatever a length in it claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"a pickle of more than {MAX_HEADER_BYTES} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        return self._file.readline(MAX_HEADER_BYTES)


def _globals_of_pickle(file: IO[bytes]) -> Iterator[str]:
    start = file.tell()
    for opcode, argument, position in pickletools.genops(_ShortReads(file)):  # pyright: ignore[reportArgumentType]
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            yield str(argument)
        if (position or 0) - start > MAX_HEADER_BYTES:
            raise ValueError(f"a pickle of more than {MAX_HEADER_BYTES} bytes")

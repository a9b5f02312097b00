"""Files that nothing may open, watched by the system: neighbours of the inputs, and stand-ins for programs."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

_IN_OPEN, _IN_ISDIR = 0x20, 0x40000000
_EVENT = struct.Struct("iIII")

PROGRAMS = ("gs", "ffmpeg", "sh", "bash", "djpeg", "xv", "display", "gswin64c", "python3", "cjxl", "touch")


class Watch:
    """Names of files in folders that were opened, by whatever process, also to run them (Linux; elsewhere none)."""

    def __init__(self, *folders: Path) -> None:
        self._descriptor = -1
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            for folder in folders:
                if libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _IN_OPEN) < 0:
                    raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")

    def opened(self) -> list[str]:
        """The names since the last call."""
        data = b""
        with suppress(BlockingIOError):
            while self._descriptor >= 0 and (part := os.read(self._descriptor, 1 << 16)):
                data += part
        names, position = [], 0
        while position < len(data):
            _, mask, _, size = _EVENT.unpack_from(data, position)
            position += _EVENT.size + size
            if not mask & _IN_ISDIR:
                names.append(data[position - size : position].rstrip(b"\0").decode())
        return names


def write_programs(folder: Path) -> None:
    """Programs that do nothing, for a `PATH` that has no others."""
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).write_text("#!/bin/false\n")
        (folder / name).chmod(0o755)

"""Versions, devices and dtypes as every report and record names them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from nopad import __version__
from nopad.counts import counted

if TYPE_CHECKING:
    import torch


def versions(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions of nopad, torch and transformers, and of CUDA where `device` is a GPU."""
    import torch
    import transformers

    names = {"nopad": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {**names, "cuda": str(torch.version.cuda)} if torch.device(device).type == "cuda" else names


def check_device(name: str, device: Any) -> torch.device:
    """The device that a name such as `"cuda:1"` stands for.

    Args:
        name: name of the argument or option, for the message.
        device: as `torch.device` takes it.

    Raises:
        ValueError: not a device, or one without values.
    """
    import torch

    with suppress(RuntimeError, TypeError):
        if torch.device(device).type != "meta":
            return torch.device(device)
    raise ValueError(f"{name}: expected cpu, cuda, cuda:1, …, got {str(device)!r}")


def start_cuda(device: str | None = None) -> threading.Thread:
    """Import torch, and begin to create the context of a GPU in a thread, which takes a second or more.

    Args:
        device: where the caller is going to compute, a GPU if there is one unless given. Nothing is done for others,
            nor where CUDA does not work: what uses the device raises.
    """

    import torch

    def start() -> None:
        with suppress(Exception):
            if torch.device(device or "cuda").type == "cuda" and torch.cuda.is_available():
                torch.empty(1, device=device or "cuda")

    thread = threading.Thread(target=start, name="nopad-cuda", daemon=True)
    thread.start()
    return thread


def device_name(device: torch.device | str) -> str:
    """`"NVIDIA H100 80GB HBM3"` of a GPU, `"cpu, 2 threads"` of a CPU, which computes with torch's threads."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {counted(threads, 'thread')}" if device.type == "cpu" else str(device)


@contextmanager
def cpu_threads(num_threads: int | None) -> Iterator[None]:
    """Let torch compute with so many threads on a CPU, `None` for as many as it does; afterwards as before.

    BLAS adds in another order with another number of threads, so that sums may differ in their last bits.
    """
    import torch

    before = torch.get_num_threads()
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        yield
    finally:
        torch.set_num_threads(before)


SWITCH_SECONDS = 0.0002


class _QuickSwitches:
    """How many need them, and how long threads waited before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._number, self._before = 0, 0.0

    def add(self, number: int) -> None:
        """So many more, or fewer."""
        with self._lock:
            if self._number == 0:
                self._before = sys.getswitchinterval()
            self._number += number
            sys.setswitchinterval(SWITCH_SECONDS if self._number else self._before)


_quick_switches = _QuickSwitches()


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let threads that wait for the interpreter's lock have it after 0.2 ms instead of 5; after the last as before.

    The thread that launches a GPU's kernels gives the lock up with every launch, and is not to wait for those that read
    and decode each time.
    """
    _quick_switches.add(1)
    try:
        yield
    finally:
        _quick_switches.add(-1)


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def process_start() -> float:
    """When this process began, before Python and its imports, as `time.perf_counter` counts; now where the system has
    no `/proc`."""
    now = time.perf_counter()
    with suppress(OSError):
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        now -= time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return now


def num_cores() -> int:
    """Number of cores that this process may use; all where the system has no such limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

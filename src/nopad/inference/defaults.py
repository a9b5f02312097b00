"""Defaults by device: tokens of a pack, dtype, and whether to compile."""

from __future__ import annotations

import torch

CAPACITY, CAPACITY_ON_CPU = 16384, 2048
"""Tokens of a pack. What a layer makes of 2048 stays in a CPU's cache and off its allocator's slow path: from 32 MiB on
glibc maps fresh pages for every tensor. On a GPU of NVIDIA's: see `default_capacity`."""
MIN_CAPACITY_ON_GPU = 8192
MEAN_SEGMENT, MEAN_SEGMENT_ON_CPU = 64, 16
"""Tokens per segment of a full pack of the default `max_segments`."""
ROWS_PER_PROCESSOR = 128
"""Rows of a GEMM that one multiprocessor computes at a time."""


def default_capacity(device: torch.device) -> int:
    """Tokens of a pack: on a GPU as many as its multiprocessors compute at a time, 16,896 on the 132 of an H100.

    One row more would cost as much as another `ROWS_PER_PROCESSOR` for each of them. Small GPUs get a multiple, so that
    images of `MAX_PATCHES` fit.
    """
    if device.type != "cuda":
        return CAPACITY_ON_CPU if device.type == "cpu" else CAPACITY
    wave = ROWS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return wave * -(-MIN_CAPACITY_ON_GPU // wave)


def default_max_segments(capacity: int, device: torch.device | None = None) -> int:
    """Segments of a pack of so many tokens; more on a CPU in inference, where only pooling depends on their number."""
    on_cpu = device is not None and device.type == "cpu"
    return max(1, capacity // (MEAN_SEGMENT_ON_CPU if on_cpu else MEAN_SEGMENT))


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32

"""Packs that fit into a device's memory."""

from __future__ import annotations

import logging

import torch

from nopad.pipeline.worker import Worker

logger = logging.getLogger(__name__)

MIN_CAPACITY = 1024


def fit_packs(worker: Worker, *, compiled: bool, may_halve: bool = True) -> None:
    """Make a worker's encoder ready for full packs, and on a GPU run some, so that nothing is slow or fails later.

    Where they do not fit into the GPU's memory, `worker.capacity` is halved until they do, and a warning is logged.

    Args:
        worker: its encoder is compiled here where `compiled`, else it runs as it is.
        compiled: compile the encoder for packs of `worker.capacity`.
        may_halve: otherwise packs have to fit as they are.

    Raises:
        ValueError: packs that do not fit, halved or not.
    """
    encoder, on_gpu = worker.encoder, worker.encoder.device.type == "cuda"
    while True:
        try:
            if compiled:
                encoder.compile(worker.capacity)
            if on_gpu:
                worker.warm_up()
            return
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        if compiled:  # here the error no longer holds on to what the pack has allocated
            encoder.uncompile()
        if on_gpu:
            torch.cuda.empty_cache()
        half = worker.capacity // 2
        what = f"packs of {worker.capacity:,} tokens do not fit into the memory of {encoder.device} ({reason})"
        if not may_halve or half < MIN_CAPACITY:
            raise ValueError(f"capacity: {what}; end what else runs there, or use another device")
        logger.warning("%s; trying %s", what, f"{half:,}")
        worker.capacity = half

"""From pictures to features: decode threads, a planner, the encoder. The bulk job and `encoder.embed` both run it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from nopad.packing import CAPACITY, CAPACITY_ON_CPU, patchify
from nopad.pipeline.batches import Batches, Embedded, Prepared, Tally
from nopad.pipeline.packer import Planner
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.transforms import Preprocessing, Resize, preprocess

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


class Worker:
    """Embeds groups of pictures with one encoder.

    What a group's features are depends on its pictures and on the settings alone: packs never mix groups, and which
    pictures share a pack follows from their order, not from how fast they are decoded.

    Args:
        encoder: runs on its own device and in its own dtype.
        capacity: tokens of a pack, prefix tokens among them; a picture of more goes alone. Unless given, what the
            encoder is compiled for, else `CAPACITY`, or `CAPACITY_ON_CPU` there.
        resize, max_patches, preprocessing: as `PackedEncoder.pack` takes them.
        tokens: give each picture's tokens, too.
        threads: that read and preprocess; one per core unless given.

    Raises:
        ValueError: a number below 1, or a rule that fits no picture.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        *,
        capacity: int | None = None,
        resize: Resize = "torch",
        max_patches: int | None = None,
        preprocessing: Preprocessing | None = None,
        tokens: bool = False,
        threads: int | None = None,
    ) -> None:
        self.threads = _cores() if threads is None else threads
        if capacity is None:
            usual = CAPACITY_ON_CPU if encoder.device.type == "cpu" else CAPACITY
            capacity = encoder.compiled_capacity or usual
        if capacity < 1 or self.threads < 1:
            raise ValueError(f"expected capacity ≥ 1 and threads ≥ 1, got {capacity} and {self.threads}")
        if encoder.training:
            raise ValueError(
                "encoder: expected in evaluation mode, got training mode, in which features may be others each time; "
                "call its eval() first"
            )
        self.encoder = encoder
        self.capacity = capacity
        self.tokens = tokens
        self.rule = preprocessing or encoder.preprocessing
        self.resize: Resize = resize
        self.max_patches = max_patches
        self.tally = Tally()
        self._lock = threading.Lock()
        self._pixels(torch.zeros(3, 64, 64, dtype=torch.uint8))  # settings that fit no picture are told at once

    @property
    def preprocessing(self) -> str:
        """How pixels are made, in words."""
        return self.rule.describe(self.resize, self.max_patches)

    def run(
        self,
        groups: Iterable[Iterable[Item]],
        read: Callable[[Item], Tensor],
        *,
        strict: bool = False,
        stop: threading.Event | None = None,
    ) -> Generator[list[Embedded], None, None]:
        """Embed group after group; while one is encoded the next is already read.

        Args:
            groups: taken one after another.
            read: gives uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a clip; runs in the decode threads.
            strict: raise the error of the first picture that cannot be used.
            stop: once set, the group in hand is finished and no other.

        Returns:
            For each group its pictures' results, in their order.

        Raises:
            ImageError: with `strict`.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="nopad-decode")
        try:
            planner: Planner[tuple[int, Prepared]] = Planner(self.capacity, most=self.encoder.compiled_max_segments)
            results: list[Embedded | None] = []
            batches = Batches(self.encoder, self.capacity, results, self.tally, tokens=self.tokens)
            for future in self._ahead(pool, groups, read):
                if future is not None:
                    prepared = self._wait(future)
                    results.append(None)
                    if isinstance(prepared, Prepared):
                        batches.take(planner.add(prepared.tokens, (len(results) - 1, prepared)))
                        continue
                    if strict and prepared.error is not None:
                        raise prepared.error
                    batches.keep(len(results) - 1, prepared)
                    continue
                batches.take(planner.finish(), to_the_end=True)
                yield [result for result in results if result is not None]
                results.clear()
                if stop is not None and stop.is_set():
                    return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ahead(
        self, pool: ThreadPoolExecutor, groups: Iterable[Iterable[Item]], read: Callable[[Item], Tensor]
    ) -> Iterator[Future[Prepared | Embedded] | None]:
        """The pictures in their order, some of them still to be decoded; `None` ends a group."""

        def started() -> Iterator[Future[Prepared | Embedded] | None]:
            for group in groups:
                for item in group:
                    yield pool.submit(self._prepare, item, read)
                yield None

        waiting: deque[Future[Prepared | Embedded] | None] = deque()
        for future in started():
            waiting.append(future)
            if len(waiting) > max(16, 2 * self.threads):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _wait(self, future: Future[Prepared | Embedded]) -> Prepared | Embedded:
        start = time.perf_counter()
        prepared = future.result()
        self.tally.wait += time.perf_counter() - start
        return prepared

    def _prepare(self, item: Item, read: Callable[[Item], Tensor]) -> Prepared | Embedded:
        """Read one picture and cut it into patches; runs in a decode thread."""
        start = time.perf_counter()
        try:
            image = read(item)
            patches, grid = patchify(self._pixels(image), self.encoder.patch_size, self.encoder.patch_order)
            height, width = image.shape[-2:]
            tokens = len(patches) + grid[0] * self.encoder.num_prefix_tokens
            return Prepared(patches.to(self.encoder.dtype), grid, tokens, width, height)
        except ImageError as error:
            return Embedded(error=error)
        except Exception as error:  # one picture must not end a job of a million; its row says what happened
            logger.exception("unexpected error with %r", item)
            return Embedded(error=ImageError(repr(item), f"unexpected {type(error).__name__}: {error}"))
        finally:
            with self._lock:
                self.tally.decode += time.perf_counter() - start

    def _pixels(self, image: Tensor) -> Tensor:
        settings = {"resize": self.resize, "max_patches": self.max_patches}
        return preprocess(image, self.rule, self.encoder.patch_size, **settings)


def _cores() -> int:
    """Cores that this process may use; where the system does not tell, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""From pictures to features: decode threads, a planner, the encoder. The bulk job and `encoder.embed` both run it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from nopad.images import ImageError
from nopad.packing import patchify
from nopad.planner import Planner
from nopad.preprocessing import Preprocessing, Resize, preprocess

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

CAPACITY, CAPACITY_ON_CPU = 16384, 2048
"""Patches of a pack, unless told otherwise. What a layer makes of 2048 stays in a CPU's cache and off its allocator's
slow path: from 32 MiB on glibc maps fresh pages for every tensor. Packs of 16384 take a third longer per image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What became of one picture or clip.

    Attributes:
        error: why there are no features, else `None`; then the others are set, `tokens` on request.
        width, height: pixels of the upright picture.
        grid: `(frames, rows, columns)` of patches.
        embedding: `(E,)` or `(D,)` float32: `image_embeds` where the checkpoint has a projection, else `pooled`.
        tokens: `(frames · rows · columns, D)` float16.
    """

    error: ImageError | None = None
    width: int | None = None
    height: int | None = None
    grid: tuple[int, int, int] | None = None
    embedding: np.ndarray | None = None
    tokens: np.ndarray | None = None


@dataclass
class Tally:
    """What a worker has done so far; seconds are of one thread, those of the decode threads added up.

    Attributes:
        images, failed: pictures done, and those of them without features.
        patches: patches encoded.
        tokens, capacity: these and their prefix tokens, and how many their packs could have held. The last pack of a
            group counts as what it holds, unless the encoder fills it up.
        packs: how many these were.
        decode, encode, wait: seconds in reading and preprocessing, in the encoder, and of the encoder for pictures.
    """

    images: int = 0
    failed: int = 0
    patches: int = 0
    tokens: int = 0
    capacity: int = 0
    packs: int = 0
    decode: float = 0.0
    encode: float = 0.0
    wait: float = 0.0

    @property
    def fill(self) -> float:
        """How full the packs were, 0 … 1."""
        return self.tokens / self.capacity if self.capacity else 0.0


@dataclass(frozen=True, slots=True)
class _Prepared:
    patches: Tensor
    grid: tuple[int, int, int]
    tokens: int
    width: int
    height: int


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
            planner: Planner[tuple[int, _Prepared]] = Planner(self.capacity, most=self.encoder.compiled_images)
            results: list[Embedded | None] = []
            batches = _Batches(self, results)
            for future in self._ahead(pool, groups, read):
                if future is not None:
                    prepared = self._wait(future)
                    results.append(None)
                    if isinstance(prepared, _Prepared):
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
    ) -> Iterator[Future[_Prepared | Embedded] | None]:
        """The pictures in their order, some of them still to be decoded; `None` ends a group."""

        def started() -> Iterator[Future[_Prepared | Embedded] | None]:
            for group in groups:
                for item in group:
                    yield pool.submit(self._prepare, item, read)
                yield None

        waiting: deque[Future[_Prepared | Embedded] | None] = deque()
        for future in started():
            waiting.append(future)
            if len(waiting) > max(16, 2 * self.threads):
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _wait(self, future: Future[_Prepared | Embedded]) -> _Prepared | Embedded:
        start = time.perf_counter()
        prepared = future.result()
        self.tally.wait += time.perf_counter() - start
        return prepared

    def _prepare(self, item: Item, read: Callable[[Item], Tensor]) -> _Prepared | Embedded:
        """Read one picture and cut it into patches; runs in a decode thread."""
        start = time.perf_counter()
        try:
            image = read(item)
            patches, grid = patchify(self._pixels(image), self.encoder.patch_size, self.encoder.patch_order)
            height, width = image.shape[-2:]
            tokens = len(patches) + grid[0] * self.encoder.num_prefix_tokens
            return _Prepared(patches.to(self.encoder.dtype), grid, tokens, width, height)
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


class _Batches:
    """Runs packs and puts what comes out at its place; a GPU computes one while the host reads the one before."""

    def __init__(self, worker: Worker, results: list[Embedded | None]) -> None:
        self.worker = worker
        self.results = results
        self.running: deque[Callable[[], None]] = deque()

    def take(self, packs: Iterable[list[tuple[int, _Prepared]]], *, to_the_end: bool = False) -> None:
        start = time.perf_counter()
        held = 0
        for pack in packs:
            self.launch(pack)
            held = sum(picture.tokens for _, picture in pack)
            self.worker.tally.tokens += held
            self.worker.tally.capacity += max(self.worker.capacity, held)
            while len(self.running) > 1:
                self.running.popleft()()
        if to_the_end:
            while self.running:
                self.running.popleft()()
            if held and not self.worker.encoder.compiled_capacity:
                self.worker.tally.capacity -= max(self.worker.capacity - held, 0)
        self.worker.tally.encode += time.perf_counter() - start

    def keep(self, place: int, result: Embedded) -> None:
        self.results[place] = result
        self.worker.tally.images += 1
        self.worker.tally.failed += result.error is not None

    def launch(self, pack: list[tuple[int, _Prepared]]) -> None:
        try:
            self.running.append(self.encode(pack))
            return
        except RuntimeError as error:
            # The CPU's allocator raises no class of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            reason = str(error)
        # Out here the error no longer holds on to what the pack has allocated.
        while self.running:
            self.running.popleft()()
        if len(pack) > 1:
            logger.warning("a pack of %d pictures does not fit into memory, each goes alone", len(pack))
            for single in pack:
                self.launch([single])
            return
        place, picture = pack[0]
        reason = f"its {len(picture.patches)} patches do not fit into memory ({reason}); set a limit: max_patches"
        self.keep(place, Embedded(error=ImageError("picture", reason)))

    @torch.inference_mode()
    def encode(self, pack: list[tuple[int, _Prepared]]) -> Callable[[], None]:
        """Start a pack; what is returned waits for it and keeps its results."""
        worker, encoder = self.worker, self.worker.encoder
        patches = torch.cat([picture.patches for _, picture in pack]).to(encoder.device, non_blocking=True)
        output = encoder.encode(patches, torch.tensor([picture.grid for _, picture in pack]))
        vectors = (output.pooled if output.image_embeds is None else output.image_embeds).float()
        vectors = vectors.to("cpu", non_blocking=True)  # pinned by torch: the copy does not hold up the next pack
        tokens = output.tokens.half().to("cpu", non_blocking=True) if worker.tokens else None
        done = None
        if patches.is_cuda:
            done = torch.cuda.Event()
            done.record()
        worker.tally.packs += 1
        worker.tally.patches += len(patches)

        def results() -> None:
            if done is not None:
                done.synchronize()
            parts = [None] * len(pack)
            if tokens is not None:
                parts = tokens.split([len(picture.patches) for _, picture in pack])
            for (place, picture), vector, part in zip(pack, vectors, parts, strict=True):
                self.keep(place, _embedded(picture, vector, part, encoder.dtype))

        return results


def _embedded(picture: _Prepared, vector: Tensor, tokens: Tensor | None, dtype: torch.dtype) -> Embedded:
    if not vector.isfinite().all():
        hint = "; float16 may overflow, bfloat16 and float32 do not" if dtype == torch.float16 else ""
        return Embedded(error=ImageError("picture", f"its features are not finite in {dtype}{hint}"))
    if tokens is not None and not tokens.isfinite().all():
        return Embedded(error=ImageError("picture", "its tokens are not finite in float16, in which they are stored"))
    return Embedded(
        width=picture.width,
        height=picture.height,
        grid=picture.grid,
        embedding=vector.numpy().copy(),
        tokens=None if tokens is None else tokens.numpy().copy(),
    )

"""From images to features: decode threads, a packer, the encoder. The bulk job and `encoder.embed` both run it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import Tensor

from nopad.packing import CAPACITY, CAPACITY_ON_CPU
from nopad.pipeline.pack_runner import EmbeddingResult, PackRunner, Results, num_segments, num_tokens
from nopad.pipeline.packer import BestFitPacker
from nopad.pipeline.prepare import Preparation, PreparedImage
from nopad.pipeline.stats import Stats
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.transforms import Preprocessing, Resize

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Outcome = PreparedImage | ImageError


class Worker:
    """Embeds groups of images with one encoder.

    What a group's features are depends on its images and on the settings alone: packs never mix groups, and which
    images share a pack follows from their order, not from how fast they are decoded.

    Args:
        encoder: runs on its own device and in its own dtype.
        capacity: tokens of a pack, prefix tokens among them; a larger image goes alone. By default what the encoder is
            compiled for, else `CAPACITY`, or `CAPACITY_ON_CPU` there.
        resize, max_patches, preprocessing: as `PackedEncoder.pack` takes them.
        tokens: return each image's tokens as well.
        threads: that read and preprocess; one per core by default.

    Raises:
        ValueError: a number below 1, a rule that fits no image, or an encoder in training mode.
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
        self.threads = num_cores() if threads is None else threads
        if capacity is None:
            default = CAPACITY_ON_CPU if encoder.device.type == "cpu" else CAPACITY
            capacity = encoder.compiled_capacity or default
        if capacity < 1 or self.threads < 1:
            raise ValueError(f"expected capacity ≥ 1 and threads ≥ 1, got {capacity} and {self.threads}")
        if encoder.training:
            raise ValueError(
                "encoder: expected in evaluation mode, got training mode, whose dropout makes features random; "
                "call its eval() first"
            )
        self.encoder = encoder
        self.capacity = capacity
        self.tokens = tokens
        options = {"resize": resize, "max_patches": max_patches, "preprocessing": preprocessing}
        self.preparation = Preparation.of(encoder, **options)
        self.stats = Stats()

    @property
    def preprocessing(self) -> str:
        """How pixels are made, in words."""
        return self.preparation.describe()

    def run(
        self,
        groups: Iterable[Iterable[Item]],
        read: Callable[[Item], Tensor],
        *,
        strict: bool = False,
        stop: threading.Event | None = None,
    ) -> Generator[list[EmbeddingResult], None, None]:
        """Embed group after group; while one is encoded the next is already read.

        Args:
            groups: taken one after another.
            read: returns uint8 `(3, H, W)`, or `(frames, 3, H, W)` for a clip; runs in the decode threads.
            strict: raise the error of the first image that cannot be used.
            stop: once set, the group in hand is finished and no other.

        Yields:
            For each group its images' results, in their order.

        Raises:
            ImageError: with `strict`.
        """
        with _ReadAhead(groups, lambda item: self.preparation(read(item)), self.threads, self.stats) as ahead:
            for outcomes in ahead.groups():
                yield self._embed(outcomes, strict=strict)
                if stop is not None and stop.is_set():
                    return

    def _embed(self, outcomes: Iterable[Outcome], *, strict: bool) -> list[EmbeddingResult]:
        encoder, results = self.encoder, dict[int, EmbeddingResult]()
        packer: BestFitPacker[tuple[int, PreparedImage]]
        packer = BestFitPacker(self.capacity, max_segments=encoder.compiled_max_segments)
        runner = PackRunner(encoder, self.capacity, self.stats, tokens=self.tokens)

        def store(more: Results) -> None:
            results.update(more)
            self.stats.images += len(more)
            self.stats.failed += sum(result.error is not None for result in more.values())

        for index, image in enumerate(outcomes):
            if isinstance(image, ImageError):
                if strict:
                    raise image
                store({index: EmbeddingResult(error=image)})
                continue
            tokens, segments = num_tokens(encoder, image), num_segments(encoder, image)
            for pack in packer.add(tokens, (index, image), segments=segments):
                store(runner.submit(pack))
        for pack in packer.finish():
            store(runner.submit(pack))
        store(runner.finish())
        return [results[index] for index in range(len(results))]


class _ReadAhead(Generic[Item]):
    """Prepares images in threads, in the order of their groups, a bounded number ahead of who takes them."""

    def __init__(
        self,
        groups: Iterable[Iterable[Item]],
        prepare: Callable[[Item], PreparedImage],
        threads: int,
        stats: Stats,
    ) -> None:
        self._items: Iterator[tuple[Item] | None] = chain.from_iterable(  # `None` ends a group
            chain(((item,) for item in group), (None,)) for group in groups
        )
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nopad-decode")
        self._max_waiting = max(16, 2 * threads)
        self._waiting: deque[Future[Outcome] | None] = deque()
        self._stats = stats
        self._lock = threading.Lock()

    def __enter__(self) -> _ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def groups(self) -> Iterator[Iterator[Outcome]]:
        """Group after group; each must be exhausted before the next."""
        self._submit()
        while self._waiting:
            yield self._group()

    def _group(self) -> Iterator[Outcome]:
        while (future := self._waiting.popleft()) is not None:
            self._submit()
            start = time.perf_counter()
            outcome = future.result()
            self._stats.wait += time.perf_counter() - start
            yield outcome
        self._submit()

    def _submit(self) -> None:
        while len(self._waiting) <= self._max_waiting:
            try:
                entry = next(self._items)
            except StopIteration:
                return
            self._waiting.append(None if entry is None else self._pool.submit(self._run, entry[0]))

    def _run(self, item: Item) -> Outcome:
        start = time.perf_counter()
        try:
            return self._prepare(item)
        except ImageError as error:
            return error
        except Exception as error:  # one image must not end a job of a million; its row has the error
            logger.exception("unexpected error with %r", item)
            return ImageError(repr(item), f"unexpected {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._stats.decode += time.perf_counter() - start


def num_cores() -> int:
    """Cores that this process may use; where the system does not say, all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

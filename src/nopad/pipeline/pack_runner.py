"""Packs of images through an encoder."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nopad.inference.compile import fills_capacity
from nopad.pipeline.device_timer import DeviceTimer
from nopad.pipeline.image_processor import PreparedImage
from nopad.pipeline.normalize import Normalizer
from nopad.pipeline.selection import Selection
from nopad.pipeline.stats import Stats
from nopad.pipeline.upload import Uploader
from nopad.preprocessing.decode import ImageError

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder
    from nopad.pipeline.device_decode import DeviceDecoder

logger = logging.getLogger(__name__)

MAX_RUNNING = 2
"""Packs that are on a GPU at once."""

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResult:
    """Features of one image or clip, or why there are none.

    Attributes:
        error: why there are no features, else `None`; then the others are set, `tokens` on request.
        width, height: pixels of the upright image.
        grid: `(frames, rows, columns)` of patches.
        embedding: `(E,)` or `(D,)` float32: `image_embeds` where the checkpoint has a projection, else `pooled`.
        tokens: `(layers · frames · rows · columns, D)` float16, see `Selection`.
        extras: values that are kept beside the patches, see `PreparedImage`.
    """

    error: ImageError | None = None
    width: int | None = None
    height: int | None = None
    grid: tuple[int, int, int] | None = None
    embedding: np.ndarray | None = None
    tokens: np.ndarray | None = None
    extras: Mapping[str, Any] | None = None


class PackRunner(Generic[Key]):
    """Runs packs of images, each with a key for its result; on a GPU one is computed while the one before is fetched.

    Args:
        normalizer: makes values of the patches.
        capacity: tokens of a full pack, for `stats`.
        selection: the features to return.
        decoder: decodes images that are encoded still.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        normalizer: Normalizer,
        capacity: int,
        stats: Stats,
        selection: Selection,
        decoder: DeviceDecoder | None = None,
    ) -> None:
        self.encoder = encoder
        self.normalizer = normalizer
        self.uploader = Uploader(encoder.device, decoder)
        # What a library does on the default stream, as nvJPEG may, waits for all that runs there.
        self.stream = None if decoder is None else torch.cuda.Stream(encoder.device)
        self.capacity = capacity
        self.stats = stats
        self.selection = selection
        self.max_running = MAX_RUNNING if encoder.device.type == "cuda" else 0
        self.running: deque[Callable[[], dict[Key, EmbeddingResult]]] = deque()
        self._pool = ThreadPoolExecutor(MAX_RUNNING, thread_name_prefix="nopad-upload") if self.max_running else None
        self._uploading: deque[tuple[Sequence[tuple[Key, PreparedImage]], Future[Callable[[], Tensor]]]] = deque()

    def submit(self, pack: Sequence[tuple[Key, PreparedImage]], *, is_last: bool = False) -> dict[Key, EmbeddingResult]:
        """Start a pack, and return the results that there are by now, mostly of earlier packs.

        Args:
            pack: keys and images.
            is_last: whether it is the last of its group; in `stats` it counts as what it holds, unless the encoder
                fills it up.
        """
        start = time.perf_counter()
        results = self._upload(pack)
        held = sum(num_tokens(self.encoder, image) for _, image in pack)
        self.stats.tokens += held
        self.stats.capacity += held if is_last and not fills_capacity(self.encoder) else max(self.capacity, held)
        results.update(self._fetch(leave=max(self.max_running - 1, 0)))
        self.stats.encode_seconds += time.perf_counter() - start
        return results

    def finish(self) -> dict[Key, EmbeddingResult]:
        """Wait for all packs, and return their results."""
        start = time.perf_counter()
        results: dict[Key, EmbeddingResult] = {}
        while self._uploading:
            results.update(self.run(*self._uploading.popleft()))
        results.update(self._fetch(leave=0))
        self.stats.encode_seconds += time.perf_counter() - start
        return results

    def _upload(self, pack: Sequence[tuple[Key, PreparedImage]]) -> dict[Key, EmbeddingResult]:
        """To a GPU a pack is copied, or decoded there, in a thread, while the one before is started here."""
        if self._pool is None:
            return self.run(pack)
        self._uploading.append((pack, self._pool.submit(self.uploader, [image for _, image in pack])))
        return self.run(*self._uploading.popleft()) if len(self._uploading) > 1 else {}

    def run(
        self, pack: Sequence[tuple[Key, PreparedImage]], upload: Future[Callable[[], Tensor]] | None = None
    ) -> dict[Key, EmbeddingResult]:
        """Start a pack, or where it does not fit into memory each of its images alone; return what is done already.

        Args:
            upload: the upload of its patches, where that was begun.
        """
        reason = self._start(pack, upload)
        upload = None
        if reason is None:
            return {}
        # Here the error no longer holds on to what the pack has allocated.
        results = self._fetch(leave=0)
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._start(pack) is None:  # other packs or another process had the memory
            return {**results, **self._fetch(leave=max(self.max_running - 1, 0))}
        if len(pack) > 1:
            logger.warning("a pack of %d images does not fit into memory, each goes alone", len(pack))
            for single in pack:
                results.update(self.run([single]))
            return results
        key, image = pack[0]
        reason = f"its {image.num_patches} patches do not fit into memory ({reason}); set a limit: max_patches"
        return {**results, key: EmbeddingResult(error=ImageError("image", reason))}

    def _start(
        self, pack: Sequence[tuple[Key, PreparedImage]], upload: Future[Callable[[], Tensor]] | None = None
    ) -> str | None:
        """Start a pack; returns the allocator's message where it does not fit into memory."""
        try:
            self.running.append(self.encode(pack, None if upload is None else upload.result()))
        except RuntimeError as error:
            # The CPU's allocator raises no class of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            return str(error)
        return None

    def encode(
        self, pack: Sequence[tuple[Key, PreparedImage]], take_patches: Callable[[], Tensor] | None = None
    ) -> Callable[[], dict[Key, EmbeddingResult]]:
        """Start a pack; the function that is returned waits for it and returns its results.

        Args:
            take_patches: gives its patches, where they were uploaded already.
        """
        if take_patches is None:
            take_patches = self.uploader([image for _, image in pack])
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self._encode(pack, take_patches)

    @torch.inference_mode()
    def _encode(
        self, pack: Sequence[tuple[Key, PreparedImage]], take_patches: Callable[[], Tensor]
    ) -> Callable[[], dict[Key, EmbeddingResult]]:
        encoder = self.encoder
        timer = DeviceTimer(encoder.device, self.stats)
        patches = self.normalizer(take_patches())
        with torch.autocast(encoder.device.type, enabled=False):  # features are of the encoder's dtype, wherever called
            vectors, tokens = self.selection.run(encoder, patches, torch.tensor([image.grid for _, image in pack]))
        vectors = vectors.to("cpu", non_blocking=True)  # pinned by torch: the copy does not hold up the next pack
        lengths = None if tokens is None else [len(of_image) for of_image in tokens]
        fetched = None if tokens is None else torch.cat(tokens).half().to("cpu", non_blocking=True)
        timer.mark()
        self.stats.packs += 1
        self.stats.patches += len(patches)

        def fetch() -> dict[Key, EmbeddingResult]:
            timer.stop()
            parts: list[np.ndarray | None] = [None] * len(pack)
            if fetched is not None and lengths is not None:
                parts = [part.numpy().copy() for part in fetched.split(lengths)]
            return _results(pack, vectors, parts, encoder.dtype)

        return fetch

    def _fetch(self, leave: int) -> dict[Key, EmbeddingResult]:
        results: dict[Key, EmbeddingResult] = {}
        while len(self.running) > leave:
            results.update(self.running.popleft()())
        return results


def num_segments(encoder: PackedEncoder, image: PreparedImage) -> int:
    """How many segments attend to themselves: the clip, or each of its frames."""
    return 1 if encoder.frames_attend_jointly else image.grid[0]


def num_tokens(encoder: PackedEncoder, image: PreparedImage) -> int:
    """Patches and the prefix tokens of each segment."""
    return image.num_patches + num_segments(encoder, image) * encoder.num_prefix_tokens


def _results(
    pack: Sequence[tuple[Key, PreparedImage]], vectors: Tensor, tokens: Sequence[np.ndarray | None], dtype: torch.dtype
) -> dict[Key, EmbeddingResult]:
    copies = vectors.numpy().copy()  # the buffer that the GPU has written to is another pack's next
    # By numpy: torch's threads would each wait for a core, all of which decode.
    finite = [bool(row.all()) for row in np.isfinite(copies)]
    return {
        key: _result(image, vector, part, dtype, is_finite=is_finite)
        for (key, image), vector, part, is_finite in zip(pack, copies, tokens, finite, strict=True)
    }


def _result(
    image: PreparedImage, vector: np.ndarray, tokens: np.ndarray | None, dtype: torch.dtype, *, is_finite: bool
) -> EmbeddingResult:
    if not is_finite:
        hint = "; float16 may overflow, bfloat16 and float32 do not" if dtype == torch.float16 else ""
        return EmbeddingResult(error=ImageError("image", f"its features are not finite in {dtype}{hint}"))
    if tokens is not None and not np.isfinite(tokens).all():
        reason = "its tokens are not finite in float16, in which they are stored"
        return EmbeddingResult(error=ImageError("image", reason))
    return EmbeddingResult(
        width=image.width,
        height=image.height,
        grid=image.grid,
        embedding=vector,
        tokens=tokens,
        extras=image.extras,
    )

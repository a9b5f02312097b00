"""Packs of pictures through an encoder: what goes in, what comes out, and what it took."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nopad.preprocessing.decode import ImageError

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)


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
class Prepared:
    """One picture or clip as the encoder takes it.

    Attributes:
        patches: `(frames · rows · columns, P)` on the CPU, in the encoder's dtype.
        grid: `(frames, rows, columns)`.
        tokens: patches and the prefix tokens that come with them.
        width, height: pixels of the upright picture.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    tokens: int
    width: int
    height: int


class Batches:
    """Runs packs and puts what comes out at its place; a GPU computes one while the host reads the one before."""

    def __init__(
        self, encoder: PackedEncoder, capacity: int, results: list[Embedded | None], tally: Tally, *, tokens: bool
    ) -> None:
        self.encoder = encoder
        self.capacity = capacity
        self.results = results
        self.tally = tally
        self.tokens = tokens
        self.running: deque[Callable[[], None]] = deque()

    def take(self, packs: Iterable[list[tuple[int, Prepared]]], *, to_the_end: bool = False) -> None:
        """Run packs; with `to_the_end` nothing is still running afterwards."""
        start = time.perf_counter()
        held = 0
        for pack in packs:
            self.launch(pack)
            held = sum(picture.tokens for _, picture in pack)
            self.tally.tokens += held
            self.tally.capacity += max(self.capacity, held)
            while len(self.running) > 1:
                self.running.popleft()()
        if to_the_end:
            while self.running:
                self.running.popleft()()
            if held and not self.encoder.compiled_capacity:
                self.tally.capacity -= max(self.capacity - held, 0)
        self.tally.encode += time.perf_counter() - start

    def keep(self, place: int, result: Embedded) -> None:
        """Put a result where its picture stands."""
        self.results[place] = result
        self.tally.images += 1
        self.tally.failed += result.error is not None

    def launch(self, pack: list[tuple[int, Prepared]]) -> None:
        """Start a pack, or where it does not fit into memory each of its pictures alone."""
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
    def encode(self, pack: list[tuple[int, Prepared]]) -> Callable[[], None]:
        """Start a pack; what is returned waits for it and keeps its results."""
        encoder = self.encoder
        patches = torch.cat([picture.patches for _, picture in pack]).to(encoder.device, non_blocking=True)
        with torch.autocast(encoder.device.type, enabled=False):  # features are of the encoder's dtype, wherever called
            output = encoder.encode(patches, torch.tensor([picture.grid for _, picture in pack]))
        vectors = (output.pooled if output.image_embeds is None else output.image_embeds).float()
        vectors = vectors.to("cpu", non_blocking=True)  # pinned by torch: the copy does not hold up the next pack
        tokens = output.tokens.half().to("cpu", non_blocking=True) if self.tokens else None
        done = None
        if patches.is_cuda:
            done = torch.cuda.Event()
            done.record()
        self.tally.packs += 1
        self.tally.patches += len(patches)

        def results() -> None:
            if done is not None:
                done.synchronize()
            parts = [None] * len(pack)
            if tokens is not None:
                parts = tokens.split([len(picture.patches) for _, picture in pack])
            for (place, picture), vector, part in zip(pack, vectors, parts, strict=True):
                self.keep(place, _embedded(picture, vector, part, encoder.dtype))

        return results


def _embedded(picture: Prepared, vector: Tensor, tokens: Tensor | None, dtype: torch.dtype) -> Embedded:
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

"""Packs of one shape, so that one compiled graph serves them all and an image's features are the same in any of them.

A matrix product may take another kernel for another number of rows, and with it another order of addition. Here every
product of a pack sees `capacity` rows, whatever is in them.
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.inference import fused
from nopad.inference.graphs import Graphs, Layers
from nopad.inference.rows import fill_up_rows, finite_rows, spoil, whole_segments
from nopad.inference.runner import EagerRunner
from nopad.inference.watch import Watch
from nopad.layers.attention import Rotation
from nopad.layers.block import add
from nopad.layers.varlen import reads_the_host
from nopad.layout import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder, Trunk

logger = logging.getLogger(__name__)

GRAPH_CAPACITY = 49152
"""Up to so many rows the host can be slower than the GPU, and a CUDA graph pays (docs/performance.md)."""
FAILURES = (
    RuntimeError,  # of torch's compilers and Triton, a missing C++ compiler among them
    ValueError,  # sizes that a product does not take
    AssertionError,  # the same, of CUTLASS
    TypeError,  # another version of quack
    AttributeError,
    LookupError,
    ImportError,
    OSError,
    subprocess.SubprocessError,
)
"""What making layers ready may raise where it cannot be done."""
SHORTEST = 256
FILLER = 512
"""What is left of a pack is cut into segments of hardly more rows: attention over long ones would take time."""


class StaticRunner:
    """Runs an encoder's layers and pooling on packs of `capacity` rows in `slots` segments; layers, one pack at a time.

    Layers that have hooks or other parts than they had run as they are.

    Args:
        encoder: its layers; they stay as they are.
        capacity: rows of a pack, prefix tokens among them.
        slots: most segments of a pack.
        layers: what runs the layers.
    """

    def __init__(self, encoder: PackedEncoder, capacity: int, slots: int, layers: Layers) -> None:
        self.capacity = capacity
        self.max_segments = slots
        self.layers = layers
        self.made_of = encoder.layers
        self.watch = Watch(encoder.layers)
        self.dropout = any(getattr(module, "dropout_p", 0.0) for module in encoder.layers.modules())
        self.trained = False
        self.lock = threading.RLock()  # what is folded or recorded is there once, for all threads

    @property
    def recorded(self) -> Layers:
        """What runs the layers, or has run them when the CUDA graphs were recorded."""
        return self.layers.layers if isinstance(self.layers, Graphs) else self.layers

    @property
    def execution(self) -> str:
        """`"fused by …"`, `"compiled"`, or `"eager"` where it was not asked for or could not be."""
        if isinstance(self.recorded, fused.FusedLayers):
            return f"fused by {self.recorded.products.name}"
        deferred = isinstance(self.recorded, partial) and self.recorded.func is run_deferred
        return "compiled" if deferred else "eager"

    def admits(self, rows: int, segments: int) -> bool:
        """Whether a pack goes in; one that does not runs as it would have without."""
        if torch.is_grad_enabled():
            self.trained = True
            return False
        if rows <= self.capacity and segments <= self.max_segments:
            return True
        _tell_once(self.capacity, self.max_segments)
        return False

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """The GEMM from patches to tokens, on `capacity` rows as all others."""
        return embedding(F.pad(patches, (0, 0, 0, self.capacity - len(patches))))[: len(patches)]

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
        """`(T, D)` to `(T, D)`; `layers` are the encoder's current ones."""
        # Not in inference mode, for which everything would be compiled once more.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            runs = self.layers if self._current(layers) else partial(run_layers, layers)
            if isinstance(runs, Graphs):
                with runs.turn():
                    return self._run(runs, tokens, segments, rotate)
            return self._run(runs, tokens, segments, rotate)

    def _run(self, layers: Layers, tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
        rows = tokens.shape[0]
        room = layers.room if isinstance(layers, Graphs) else None
        tokens, finite = fill_up_rows(tokens, self.capacity, room)
        rotate = None if rotate is None else rotate.padded(self.capacity)
        # What is recorded or compiled sees as many segments each time; kernels called one by one need not.
        slots = None if isinstance(layers, fused.FusedLayers) else self.max_segments
        tokens = layers(tokens, fill_up(segments, self.capacity, slots), rotate)[:rows]
        return spoil(tokens, finite, segments)

    def _current(self, own: nn.ModuleList) -> bool:
        """Whether the layers are those that were made ready; weights that are folded may have changed."""
        if own is not self.made_of or self.watch.rebuilt() or (self.dropout and own.training):
            return False
        if isinstance(self.recorded, fused.FusedLayers):
            current = self.recorded.refresh(trained=self.trained)
            self.trained = self.trained and not current
            return current
        return not (isinstance(self.layers, Graphs) and self.watch.moved())

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`."""
        finite, tokens = finite_rows(trunk.tokens)
        # More rows than slots: a segment of no tokens could not be pooled.
        slots = self.max_segments + 1
        rows = self.capacity + slots
        tokens = F.pad(tokens, (0, 0, 0, rows - tokens.shape[0]))
        pooled = encoder.pool_segments(type(trunk)(tokens, trunk.prefix_tokens), segments.filled_up(rows, slots))
        spoilt = ~whole_segments(finite, segments)
        return pooled[: len(segments)].masked_fill(spoilt[:, None], float("nan"))

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """`(N, D)` to `(N, E)`."""
        projected = encoder.project(F.pad(pooled, (0, 0, 0, max(self.max_segments - len(pooled), 0))))
        return None if projected is None else projected[: len(pooled)]

    def __deepcopy__(self, memo: object) -> EagerRunner:
        """A copy of a compiled encoder is not compiled."""
        return EagerRunner()

    def __reduce__(self) -> tuple[type[EagerRunner], tuple[()]]:
        return EagerRunner, ()


def fill_up(segments: Segments, capacity: int, slots: int | None) -> Segments:
    """The segments of a static pack, and a `max_seqlen` of few values.

    With `slots` there are as many for all packs of at most so many segments, without as few as can be.
    """
    least = len(segments) + (capacity - segments.num_tokens) // FILLER + 1
    filled = segments.filled_up(capacity, least if slots is None else slots + capacity // FILLER + 1)
    return dataclasses.replace(filled, max_seqlen=longest(filled.max_seqlen, capacity))


@lru_cache
def _tell_once(capacity: int, slots: int) -> None:
    logger.warning("a pack does not fit into the compiled %d tokens and %d segments, it runs as it is", capacity, slots)


def longest(max_seqlen: int, capacity: int) -> int:
    """`max_seqlen` rounded up to a power of two: few graphs, and one choice of tiles for most packs."""
    return min(max(SHORTEST, 1 << (max_seqlen - 1).bit_length()), capacity)


def compile_layers(encoder: PackedEncoder, capacity: int, slots: int, compiled: bool) -> Layers:
    """The encoder's layers, compiled one by one, warm for packs of this shape.

    The layers of an encoder have one code, in float8 two, which is compiled once and serves them all. Where it cannot
    be compiled they run as they are, and a warning says why. On a GPU packs of at most `GRAPH_CAPACITY` rows are CUDA
    graphs, unless the attention goes by the host's lengths.
    """
    if not compiled:
        return partial(run_layers, encoder.layers)
    start = time.perf_counter()
    layers = _first_that_works(encoder, capacity, slots)
    if recordable(encoder.device, encoder.attention, capacity):
        layers = Graphs(layers)
        warm_up(encoder, layers, capacity, slots)
    logger.info("compiled for packs of %d tokens in %.0f s", capacity, time.perf_counter() - start)
    return layers


def recordable(device: torch.device, attention: str, capacity: int) -> bool:
    """Whether layers become CUDA graphs: what goes by lengths on the host would replay those of the first pack."""
    return device.type == "cuda" and capacity <= GRAPH_CAPACITY and not reads_the_host(attention)


def _first_that_works(encoder: PackedEncoder, capacity: int, slots: int) -> Layers:
    message = ""
    for make in _makers(encoder):
        if message:
            logger.warning("the layers are compiled in another way than the fastest: %s", message)
        try:
            layers = make()
            warm_up(encoder, layers, capacity, slots)
            return layers
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except FAILURES as error:
            message = (str(error).strip() or repr(error)).splitlines()[0]
    logger.warning("the layers run uncompiled: %s", message)
    return partial(run_layers, encoder.layers)


def _makers(encoder: PackedEncoder) -> Iterator[Callable[[], Layers]]:
    """What can run the layers, fastest first."""
    reason = fused.obstacle(encoder, encoder.device, encoder.dtype)
    if reason is None:
        makers, reason = fused.products_for(encoder, encoder.device, encoder.dtype)
        rotation = encoder.example_rotation(encoder.num_prefix_tokens + 1)
        for make in makers:
            yield lambda make=make: fused.FusedLayers(encoder.layers, make(), rotation)
    if reason is not None:
        logger.info("layers are not as fast as they could be: %s", reason)
    yield lambda: partial(run_deferred, encoder.layers, torch.compile(_deferred))


def run_layers(layers: Any, tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
    """One layer after another, as they are."""
    for layer in layers:
        tokens = layer(tokens, segments, rotate)
    return tokens


def run_deferred(
    layers: Any, one: Callable[..., Any], tokens: Tensor, segments: Segments, rotate: Rotation | None
) -> Tensor:
    """One layer after another by `one`, each making the sum that the one before has left."""
    update = None
    for layer in layers:
        tokens, update = one(layer, tokens, update, segments, rotate)
    return tokens if update is None else add(tokens, update)


def _deferred(
    layer: Any, tokens: Tensor, update: Tensor | None, segments: Segments, rotate: Rotation | None
) -> tuple[Tensor, Tensor]:
    return layer.deferred(tokens, update, segments, rotate)


@torch.no_grad()
def warm_up(encoder: PackedEncoder, layers: Layers, capacity: int, slots: int) -> None:
    """Run all lengths of segments that make a graph of their own, and what stands around layers; check fused ones."""
    encoder.example_positions()
    rotation = encoder.example_rotation(capacity)
    tokens = torch.randn(capacity, encoder.hidden_size, device=encoder.device).to(encoder.dtype)
    tokens, finite = fill_up_rows(tokens, capacity)
    spoil(tokens, finite, Segments.of([capacity], encoder.device))
    lengths = sorted({longest(1 << power, capacity) for power in range(capacity.bit_length())})
    if isinstance(layers, fused.FusedLayers) and not Watch(encoder.layers).rebuilt():  # nobody's hook sees it
        layers.check(tokens, fill_up(Segments.of(lengths[:1], encoder.device), capacity, None), rotation)
    for length in lengths:
        segments = fill_up(Segments.of([length], encoder.device), capacity, slots)
        layers(tokens, segments, rotation)

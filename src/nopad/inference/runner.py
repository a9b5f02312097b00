"""Runners: one runs a pack as it is, the other fills it up to one shape.

An encoder calls `admits` once per pack. Everything that could be done in two ways, from the patches' GEMM to the
projection, goes through the runner that this chose.

A matrix product may take another kernel for another number of rows, and with it another order of addition. The runner
of `PackedEncoder.compile` gives every product of a pack `capacity` rows, whatever is in them: one compiled graph serves
all packs, and an image's features are the same in any of them.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.inference.guards import Watch
from nopad.inference.padding import fill_up_rows, finite_rows, spoil, whole_segments
from nopad.inference.ready import PlainLayers, ReadyLayers
from nopad.layers.attention import Rope
from nopad.outputs import Trunk
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)

SHORTEST = 256
FILLER = 512
"""What is left of a pack is cut into segments of hardly more rows: attention over long ones would take time."""


class Runner(Protocol):
    """Runs one pack.

    Attributes:
        capacity: rows that a pack is filled up to, `None` where it is not.
        max_segments: most segments of a pack, `None` without a limit.
    """

    @property
    def capacity(self) -> int | None: ...
    @property
    def max_segments(self) -> int | None: ...

    def execution(self, layers: nn.ModuleList) -> str:
        """How these layers run: `"eager"`, `"compiled"`, `"fused by quack"` or `"fused by torch"`."""
        ...

    def admits(self, rows: int, segments: int) -> bool:
        """Whether a pack of so many rows, prefix tokens among them, and segments can be run."""
        ...

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """The GEMM from patches to tokens, `(T, P)` to `(T, D)`."""
        ...

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """All layers, `(T, D)` to `(T, D)`."""
        ...

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`."""
        ...

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """`(N, D)` to `(N, E)`, `None` where the checkpoint has no projection."""
        ...


class EagerRunner:
    """Runs a pack as it is.

    Args:
        hidden_states: a list that gets the tokens before each layer and after the last; `None` keeps none.
    """

    capacity = None
    max_segments = None

    def __init__(self, hidden_states: list[Tensor] | None = None) -> None:
        self.hidden_states = hidden_states

    def execution(self, layers: nn.ModuleList) -> str:
        """See `Runner`."""
        return "eager"

    def admits(self, rows: int, segments: int) -> bool:
        """Always."""
        return True

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """See `Runner`."""
        return embedding(patches)

    def run(self, layers: Iterable[nn.Module], tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`."""
        states = self.hidden_states
        for layer in layers:
            if states is not None:
                states.append(tokens)
            tokens = layer(tokens, segments, rope)
        if states is not None:
            states.append(tokens)
        return tokens

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """See `Runner`."""
        return encoder.pool_segments(trunk, segments)

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """See `Runner`."""
        return None if encoder.projection is None else encoder.projection(pooled)


class StaticRunner:
    """Runs an encoder's layers and pooling on packs of `capacity` rows in `slots` segments; layers, one pack at a time.

    Layers that have hooks or other parts than they had run as they are.

    Args:
        encoder: its layers; they stay as they are.
        capacity: rows of a pack, prefix tokens among them.
        slots: most segments of a pack.
        layers: what runs the layers.
    """

    def __init__(self, encoder: PackedEncoder, capacity: int, slots: int, layers: ReadyLayers) -> None:
        self.capacity = capacity
        self.max_segments = slots
        self.dtype = encoder.dtype
        self.layers = layers
        self.made_of = encoder.layers
        self.watch = Watch(encoder.layers)
        self.dropout = any(getattr(module, "dropout_p", 0.0) for module in encoder.layers.modules())
        self.trained = False
        self.lock = threading.RLock()  # what is folded or recorded is there once, for all threads

    def execution(self, layers: nn.ModuleList) -> str:
        """`"fused by …"`, `"compiled"`, or `"eager"` where it was not asked for, could not be, or is no longer."""
        return self.layers.execution if self._unchanged(layers) else "eager"

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

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`; `layers` are the encoder's current ones."""
        # Not in inference mode, for which everything would be compiled once more.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            ready = self.layers if self._current(layers) else PlainLayers(layers)
            if ready.copies_weights:  # in their own dtype, beside float32 tokens that autocast made before the layers
                tokens = tokens.to(self.dtype)
            with ready.exclusive():
                filled, finite = fill_up_rows(tokens, self.capacity, ready.static_input)
                filled_rotate = None if rope is None else rope.padded(self.capacity)
                slots = self.max_segments if ready.fixed_segments else None
                output = ready(filled, fill_up(segments, self.capacity, slots), filled_rotate)
                return spoil(output[: len(tokens)], finite, segments)

    def _unchanged(self, layers: nn.ModuleList) -> bool:
        """Whether these are the layers that were made ready, without hooks or other parts since."""
        return layers is self.made_of and not self.watch.rebuilt() and not (self.dropout and layers.training)

    def _current(self, layers: nn.ModuleList) -> bool:
        """Whether what was made ready can be run; weights that are folded may have changed."""
        if not self._unchanged(layers) or (self.layers.fixed_memory and self.watch.moved()):
            return False
        current = self.layers.refresh(trained=self.trained)
        self.trained = self.trained and not current
        return current

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`."""
        finite, tokens = finite_rows(trunk.tokens)
        # More rows than slots: a segment of no tokens could not be pooled.
        slots = self.max_segments + 1
        rows = self.capacity + slots
        tokens = F.pad(tokens, (0, 0, 0, rows - tokens.shape[0]))
        pooled = encoder.pool_segments(Trunk(tokens, trunk.prefix_tokens), segments.padded(rows, slots))
        spoilt = ~whole_segments(finite, segments)
        return pooled[: len(segments)].masked_fill(spoilt[:, None], float("nan"))

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """`(N, D)` to `(N, E)`."""
        if encoder.projection is None:
            return None
        return encoder.projection(F.pad(pooled, (0, 0, 0, max(self.max_segments - len(pooled), 0))))[: len(pooled)]

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
    filled = segments.padded(capacity, least if slots is None else slots + capacity // FILLER + 1)
    return dataclasses.replace(filled, max_seqlen=longest(filled.max_seqlen, capacity))


@lru_cache
def _tell_once(capacity: int, slots: int) -> None:
    logger.warning("a pack does not fit into the compiled %d tokens and %d segments, it runs as it is", capacity, slots)


def longest(max_seqlen: int, capacity: int) -> int:
    """`max_seqlen` rounded up to a power of two: few graphs, and one choice of tiles for most packs."""
    return min(max(SHORTEST, 1 << (max_seqlen - 1).bit_length()), capacity)

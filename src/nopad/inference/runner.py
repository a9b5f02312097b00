"""Runners: `EagerRunner` runs a pack as it is, `StaticRunner` pads it to a fixed shape.

An encoder calls `accepts` once per pack and runs the whole pack, from the patch embedding to the projection, through
the runner that this selects.

For another number of rows, a GEMM may select another kernel, and with it another order of addition. `StaticRunner`
gives every GEMM `capacity` rows: one compiled graph serves all packs, and an image's features are bit-equal in any
pack.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nopad.counts import counted
from nopad.inference.guards import ModuleGuard
from nopad.inference.layer_stack import EagerLayers, LayerStack
from nopad.inference.padding import finite_segments, mask_nonfinite_rows, pad_rows, pad_segments, poison_segments
from nopad.layers.attention import Rope
from nopad.outputs import Trunk
from nopad.segments import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs one pack.

    Attributes:
        capacity: rows that a pack is padded to, `None` without padding.
        max_segments: maximum number of segments of a pack, `None` without a limit.
    """

    @property
    def capacity(self) -> int | None: ...
    @property
    def max_segments(self) -> int | None: ...

    def execution(self, layers: nn.ModuleList) -> str:
        """How these layers run: `"eager"`, `"compiled"`, `"fused by quack"` or `"fused by torch"`."""
        ...

    def accepts(self, rows: int, segments: int) -> bool:
        """Whether this runner takes a pack of this many rows, prefix tokens included, and segments."""
        ...

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """Run the patch embedding's GEMM, `(T, P)` to `(T, D)`."""
        ...

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """Run all layers, `(T, D)` to `(T, D)` on the device of the segments, wherever the layers are."""
        ...

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """One vector per segment, `(S, D)`."""
        ...

    def merge(self, merger: nn.Module, tokens: Tensor, num_tokens: int) -> Tensor:
        """Run a merger of blocks of `num_tokens` tokens: `(T, D)`, block after block, to `(T / num_tokens, E)`."""
        ...

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """Project `(N, D)` to `(N, E)`; `None` where the checkpoint has no projection."""
        ...


class EagerRunner:
    """Runs a pack as it is.

    Args:
        hidden_states: a list to append the tokens before each layer and after the last to, or `None`.
    """

    capacity: int | None = None
    max_segments: int | None = None

    def __init__(self, hidden_states: list[Tensor] | None = None) -> None:
        self.hidden_states = hidden_states

    def execution(self, layers: nn.ModuleList) -> str:
        """See `Runner`."""
        return "eager"

    def accepts(self, rows: int, segments: int) -> bool:
        """Always `True`."""
        return True

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """See `Runner`."""
        return embedding(patches)

    def run(self, layers: Iterable[nn.Module], tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`."""
        device = segments.cu_seqlens.device
        for layer in layers:
            if self.hidden_states is not None:
                self.hidden_states.append(tokens.to(device))
            tokens = layer(tokens, segments, rope)
        tokens = tokens.to(device)
        if self.hidden_states is not None:
            self.hidden_states.append(tokens)
        return tokens

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """See `Runner`."""
        return encoder.pool_segments(trunk, segments).to(trunk.tokens.device)

    def merge(self, merger: nn.Module, tokens: Tensor, num_tokens: int) -> Tensor:
        """See `Runner`."""
        return merger(tokens)

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """See `Runner`."""
        return None if encoder.projection is None else encoder.projection(pooled)


class StaticRunner:
    """Runs packs on `capacity` rows, with a fixed number of segments for pooling; one pack at a time in the layers.

    Layers whose structure has changed, or that have hooks, run eagerly, on `capacity` rows too.

    Args:
        encoder: the encoder that this runs; its layers are not changed.
        capacity: rows of a pack, prefix tokens included.
        max_segments: maximum number of segments of a pack.
        stack: runs the encoder's layers, as `compile` chose.
        compiled: whether they were to be compiled, for copies of the encoder.
    """

    def __init__(
        self, encoder: PackedEncoder, capacity: int, max_segments: int, stack: LayerStack, *, compiled: bool
    ) -> None:
        self.capacity = capacity
        self.max_segments = max_segments
        self.compiled = compiled
        self.dtype = encoder.dtype
        self.stack = stack
        self.source = encoder.layers
        self.guard = ModuleGuard(encoder.layers)
        random = ("dropout_p", "drop_path")
        self.dropout = any(getattr(module, name, 0.0) for module in encoder.layers.modules() for name in random)
        self.trained = False
        self.warnings = Warnings()
        self.lock = threading.RLock()  # threads share folded weights and recorded graphs

    def execution(self, layers: nn.ModuleList) -> str:
        """How these layers run: as `compile` chose, or `"eager"` where they have changed since."""
        return self.stack.execution if self._structure_unchanged(layers) else "eager"

    def accepts(self, rows: int, segments: int) -> bool:
        """Whether a pack fits and needs no gradient; others run eagerly."""
        if torch.is_grad_enabled():
            self.trained = True
            if not self.source.training:
                advice = "call the encoder under torch.inference_mode()"
                self.warnings.log(f"compiled layers run without gradients alone; {advice}")
            return False
        return fits(self, rows, segments)

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """See `Runner`."""
        return run_padded(embedding, patches, self.stack.block_rows or self.capacity)[: len(patches)]

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `Runner`; `layers`: the encoder's current layers."""
        tokens = tokens.to(segments.cu_seqlens.device)
        # In inference mode, everything would be compiled again.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            stack = self.stack if self._is_current(layers) else EagerLayers(layers)
            if stack.copies_weights:  # GEMMs in the weights' dtype; tokens may be float32 under autocast
                tokens = tokens.to(self.dtype)
            with stack.exclusive():
                rows = stack.padded_rows(len(tokens), self.capacity)
                padded_tokens, finite = pad_rows(tokens, rows, stack.static_input)
                padded_rope = None if rope is None else rope.padded(rows)
                max_segments = self.max_segments if stack.fixed_segments else None
                output = stack(padded_tokens, pad_segments(segments, rows, max_segments), padded_rope)
                return poison_segments(output[: len(tokens)], finite, segments)

    def _structure_unchanged(self, layers: nn.ModuleList) -> bool:
        """Whether these are the compiled layers, with the same modules and without hooks."""
        unchanged = layers is self.source and not self.guard.structure_changed()
        return unchanged and not (self.dropout and layers.training)

    def _is_current(self, layers: nn.ModuleList) -> bool:
        """Whether the compiled layers can run; updates their copies of weights."""
        if not self._structure_unchanged(layers) or (self.stack.fixed_memory and self.guard.storage_changed()):
            return False
        current = self.stack.refresh(trained=self.trained)
        self.trained = self.trained and not current
        return current

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """See `Runner`."""
        finite, tokens = mask_nonfinite_rows(trunk.tokens)
        # One row more for each segment, since an empty segment cannot be pooled.
        num_segments = self.max_segments + 1
        num_rows = self.capacity + num_segments
        tokens = F.pad(tokens, (0, 0, 0, num_rows - tokens.shape[0]))
        prefix, poisoned = trunk.prefix_tokens, ~finite_segments(finite, segments)
        if prefix is not None and encoder.head_reads_prefix:
            finite, rows = mask_nonfinite_rows(prefix.flatten(0, 1))
            prefix, poisoned = rows.view_as(prefix), poisoned | ~finite.view(prefix.shape[:2]).all(dim=1)
        if prefix is not None:
            prefix = F.pad(prefix, (0, 0, 0, 0, 0, num_segments - len(prefix)))
        padded_segments = segments.padded(num_rows, num_segments)
        pooled = encoder.pool_segments(Trunk(tokens, prefix), padded_segments).to(tokens.device)
        return pooled[: len(segments)].masked_fill(poisoned[:, None], float("nan"))

    def merge(self, merger: nn.Module, tokens: Tensor, num_tokens: int) -> Tensor:
        """See `Runner`."""
        rows = self.stack.block_rows or self.capacity
        return run_padded(merger, tokens, rows + -rows % num_tokens)[: len(tokens) // num_tokens]

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """See `Runner`."""
        if encoder.projection is None:
            return None
        return encoder.projection(F.pad(pooled, (0, 0, 0, max(self.max_segments - len(pooled), 0))))[: len(pooled)]

    def __reduce__(self) -> tuple[type[DeferredRunner], tuple[int, int, bool]]:
        # Of a copy too: compiled layers and graphs are those of this encoder's weights.
        return DeferredRunner, (self.capacity, self.max_segments, self.compiled)


class DeferredRunner(EagerRunner):
    """In a copied or unpickled encoder what a `StaticRunner` is in the first one: it is compiled when it is first used.

    Args:
        capacity, max_segments, compiled: as `StaticRunner` has them.
    """

    def __init__(self, capacity: int, max_segments: int, compiled: bool) -> None:
        super().__init__()
        self.capacity: int = capacity  # pyright: ignore[reportIncompatibleVariableOverride]
        self.max_segments: int = max_segments  # pyright: ignore[reportIncompatibleVariableOverride]
        self.compiled = compiled
        self.warnings = Warnings()
        self.lock = threading.Lock()

    def accepts(self, rows: int, segments: int) -> bool:
        """See `StaticRunner`."""
        if torch.is_grad_enabled():
            return False
        return fits(self, rows, segments)

    def __reduce__(self) -> tuple[type[DeferredRunner], tuple[int, int, bool]]:
        return DeferredRunner, (self.capacity, self.max_segments, self.compiled)


def run_padded(function: Callable[[Tensor], Tensor], input: Tensor, rows: int) -> Tensor:
    """Run a function on blocks of so many rows, the last one padded with zeros; the outputs follow each other."""
    blocks = F.pad(input, (0, 0, 0, -len(input) % rows)).split(rows)
    outputs = [function(block) for block in blocks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class Warnings:
    """The warnings of one encoder, each logged once."""

    def __init__(self) -> None:
        self.logged: set[str] = set()

    def log(self, message: str) -> None:
        """Log a warning unless it has been logged."""
        if message not in self.logged:
            self.logged.add(message)
            logger.warning(message)


class FixedShape(Protocol):
    """The attributes of a runner that `fits` reads."""

    capacity: int
    max_segments: int
    warnings: Warnings


def fits(runner: FixedShape, rows: int, segments: int) -> bool:
    """Whether a pack fits into a runner's shape; if not, a warning is logged, once for each runner."""
    if rows <= runner.capacity and segments <= runner.max_segments:
        return True
    shape = f"{counted(runner.capacity, 'token')} and {counted(runner.max_segments, 'segment')}"
    runner.warnings.log(f"a pack exceeds the compiled capacity of {shape}; it runs eagerly")
    return False

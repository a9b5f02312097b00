"""Runners: one runs a pack as it is, the other (`nopad.inference.static`) fills it up to one shape.

An encoder calls `admits` once per pack. Everything that could be done in two ways, from the patches' GEMM to the
projection, goes through the runner that this chose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from nopad.layers.attention import Rotation
from nopad.layout import Segments

if TYPE_CHECKING:
    from nopad.encoder import PackedEncoder, Trunk


class Runner(Protocol):
    """Runs one pack.

    Attributes:
        execution: `"eager"`, `"compiled"`, `"fused by quack"` or `"fused by torch"`.
        capacity: rows that a pack is filled up to, `None` where it is not.
        max_segments: most segments of a pack, `None` without a limit.
    """

    @property
    def execution(self) -> str: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def max_segments(self) -> int | None: ...

    def admits(self, rows: int, segments: int) -> bool:
        """Whether a pack of so many rows, prefix tokens among them, and segments can be run."""
        ...

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """The GEMM from patches to tokens, `(T, P)` to `(T, D)`."""
        ...

    def run(self, layers: nn.ModuleList, tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
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

    execution = "eager"
    capacity = None
    max_segments = None

    def __init__(self, hidden_states: list[Tensor] | None = None) -> None:
        self.hidden_states = hidden_states

    def admits(self, rows: int, segments: int) -> bool:
        """Always."""
        return True

    def embed(self, embedding: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
        """See `Runner`."""
        return embedding(patches)

    def run(self, layers: Iterable[nn.Module], tokens: Tensor, segments: Segments, rotate: Rotation | None) -> Tensor:
        """See `Runner`."""
        for layer in layers:
            self._keep(tokens)
            tokens = layer(tokens, segments, rotate)
        self._keep(tokens)
        return tokens

    def _keep(self, tokens: Tensor) -> None:
        if self.hidden_states is not None:
            self.hidden_states.append(tokens)

    def pool(self, encoder: PackedEncoder, trunk: Trunk, segments: Segments) -> Tensor:
        """See `Runner`."""
        return encoder.pool_segments(trunk, segments)

    def project(self, encoder: PackedEncoder, pooled: Tensor) -> Tensor | None:
        """See `Runner`."""
        return encoder.project(pooled)

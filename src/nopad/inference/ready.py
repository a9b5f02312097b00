"""Layers made ready for packs of one shape."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from nopad.layers.attention import Rope
from nopad.layers.block import add_residual
from nopad.segments import Segments

RECOMPILE_LIMIT = 1 << 20
"""Graphs of one function, of all encoders and capacities of a process. torch's own limit is 8, from which on it runs
the function as it is, without an error."""


class ReadyLayers:
    """All layers of an encoder: tokens, segments and rotation to tokens.

    Attributes:
        execution: how they run, for reports.
        fixed_segments: whether each pack needs as many segments as the one before.
        copies_weights: whether they multiply with copies of the weights, which `refresh` writes to.
        fixed_memory: whether weights are read where they lay when the layers were made ready.
        static_input: `(capacity, D)` that tokens can be written to, `None` where they may lie anywhere.
    """

    execution = "eager"
    fixed_segments = True
    copies_weights = False
    fixed_memory = False
    static_input: Tensor | None = None

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        raise NotImplementedError

    def refresh(self, *, trained: bool = False) -> bool:
        """Take over changed weights.

        Args:
            trained: weights may have changed unnoticed: fused optimizers do not count a tensor's version up.

        Returns:
            `False` where that cannot be.
        """
        return True

    def exclusive(self) -> AbstractContextManager[None]:
        """A context in which memory that packs share belongs to one of them."""
        return nullcontext()


class PlainLayers(ReadyLayers):
    """Runs one layer after another, as they are."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = layers

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `ReadyLayers`."""
        for layer in self.layers:
            tokens = layer(tokens, segments, rope)
        return tokens


class CompiledLayers(ReadyLayers):
    """Runs one layer after another by `torch.compile`, each making the sum that the one before has left.

    The layers of an encoder have one code, in float8 two, which is compiled once and serves them all.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = layers
        self.seen_uncompiled = False
        self.one = torch.compile(self._one)

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`"compiled"`, or `"eager"` where torch ran a layer of the last pack uncompiled."""
        return "eager" if self.seen_uncompiled else "compiled"

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `ReadyLayers`."""
        residual, self.seen_uncompiled = None, False
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            for layer in self.layers:
                tokens, residual = self.one(layer, tokens, residual, segments, rope)
        return tokens if residual is None else add_residual(residual, tokens)

    def _one(
        self, layer: Any, tokens: Tensor, residual: Tensor | None, segments: Segments, rope: Rope | None
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            self.seen_uncompiled = True
        return layer.forward_deferred_residual(tokens, residual, segments, rope)

"""Layer stacks: ways to run all layers of an encoder on packs of a fixed shape."""

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
"""Graphs of one function, for all encoders and capacities of a process. Beyond torch's default limit of 8, the function
runs uncompiled without an error."""


class LayerStack:
    """Base class: runs all layers of an encoder.

    Attributes:
        execution: how the layers run, for reports.
        fixed_segments: whether every pack must have the same number of segments.
        copies_weights: whether GEMMs read copies of the weights, which `refresh` updates.
        fixed_memory: whether weights are read at the addresses that they had at `compile`.
        generation: increases when `refresh` replaces tensors that a CUDA graph reads.
        static_input: `(capacity, D)` tensor that tokens can be written to; `None` where they may lie anywhere.
        block_rows: rows of every GEMM, `None` for those of a whole pack.
    """

    execution = "eager"
    fixed_segments = True
    copies_weights = False
    fixed_memory = False
    generation = 0
    static_input: Tensor | None = None
    block_rows: int | None = None

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(T, D)` to `(T, D)`."""
        raise NotImplementedError

    def refresh(self, *, trained: bool = False) -> bool:
        """Update copies of weights that have changed.

        Args:
            trained: weights may have changed without a new version: fused optimizers do not increment the counter.

        Returns:
            `False` where the layers have changed so much that they cannot run this way.
        """
        return True

    def padded_rows(self, num_rows: int, capacity: int) -> int:
        """Rows that a pack of `num_rows` is padded to."""
        return capacity

    def exclusive(self) -> AbstractContextManager[None]:
        """A context in which one pack has the memory that all packs share."""
        return nullcontext()


class EagerLayers(LayerStack):
    """Runs one layer after another, uncompiled."""

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = layers

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `LayerStack`."""
        for layer in self.layers:
            tokens = layer(tokens, segments, rope)
        return tokens.to(segments.cu_seqlens.device)  # wherever the last layer is


class CompiledLayers(LayerStack):
    """Runs one layer after another by `torch.compile`, with each residual sum fused into the next layer's norm.

    The layers of an encoder share their code, so one compiled graph serves all of them; two graphs in float8.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self.layers = layers
        self.ran_uncompiled = False
        self.compiled_layer = torch.compile(self._run_layer)

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`"compiled"`, or `"eager"` where torch ran a layer of the last pack uncompiled."""
        return "eager" if self.ran_uncompiled else "compiled"

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """See `LayerStack`."""
        residual, self.ran_uncompiled = None, False
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
            for layer in self.layers:
                tokens, residual = self.compiled_layer(layer, tokens, residual, segments, rope)
        return tokens if residual is None else add_residual(residual, tokens)

    def _run_layer(
        self, layer: Any, tokens: Tensor, residual: Tensor | None, segments: Segments, rope: Rope | None
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            self.ran_uncompiled = True
        return layer.forward_deferred_residual(tokens, residual, segments, rope)

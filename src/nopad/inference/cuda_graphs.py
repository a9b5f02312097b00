"""Layers recorded as CUDA graphs, for packs whose kernels are over before the host has launched the next ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nopad.inference.ready import ReadyLayers
from nopad.layers.attention import Rope
from nopad.segments import Segments


class Graphs(ReadyLayers):
    """Layers recorded as CUDA graphs, one for each `max_seqlen`, which share what they read."""

    def __init__(self, layers: ReadyLayers) -> None:
        self.layers = layers
        self.fixed_memory = not layers.copies_weights
        self.inputs: list[Tensor] = []
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.stream: torch.cuda.Stream | None = None  # torch's own for recordings is on the GPU of the first of all
        self.done: torch.cuda.Event | None = None

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How the layers ran when they were recorded."""
        return self.layers.execution

    def refresh(self, *, trained: bool = False) -> bool:
        """See `ReadyLayers`."""
        return self.layers.refresh(trained=trained)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until the kernels of the turn before are done with the common memory, on whatever stream they are."""
        if self.done is None:
            self.done = torch.cuda.Event()
        else:
            self.done.wait()
        yield
        self.done.record()

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(capacity, D)` to `(capacity, D)`, which the next call overwrites."""
        given = [tokens, segments.cu_seqlens, *(() if rope is None else (rope.cos, rope.sin))]
        if not self.inputs:
            self.inputs = [tensor.clone() for tensor in given]
        for own, tensor in zip(self.inputs, given, strict=True):
            if own is not tensor:
                own.copy_(tensor)
        if segments.max_seqlen not in self.graphs:
            kept = tokens.clone()  # the first run may overwrite them
            self.graphs[segments.max_seqlen] = self._record(segments, rope)
            self.inputs[0].copy_(kept)
        graph, output = self.graphs[segments.max_seqlen]
        graph.replay()
        return output

    @property
    def static_input(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`(capacity, D)` that tokens are copied to, unless they are there; `None` before the first call."""
        return self.inputs[0] if self.inputs else None

    def _record(self, segments: Segments, rope: Rope | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        tokens, offsets, *turns = self.inputs
        own = Segments(segments.lengths, offsets, segments.max_seqlen)
        turn = None if rope is None else Rope(rope.apply, *turns)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # a recording must not be the first run of anything
            self.layers(tokens, own, turn)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, _ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            output = self.layers(tokens, own, turn)
        return graph, output

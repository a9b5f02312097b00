"""CUDA graphs for launch-bound packs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nopad.inference.layer_stack import LayerStack
from nopad.layers.attention import Rope
from nopad.segments import Segments


class CUDAGraphLayers(LayerStack):
    """Layers recorded as CUDA graphs, one for each `max_seqlen`; the graphs share their static inputs.

    Windows of all packs have one `max_seqlen`, and none changes the number of graphs.
    """

    def __init__(self, layers: LayerStack) -> None:
        self.layers = layers
        self.fixed_memory = not layers.copies_weights
        self.generation = layers.generation
        self.inputs: list[Tensor] = []
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.stream: torch.cuda.Stream | None = None  # torch's own capture stream is on the GPU of the first capture
        self.done: torch.cuda.Event | None = None

    @property
    def execution(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The `execution` of the recorded layers."""
        return self.layers.execution

    def refresh(self, *, trained: bool = False) -> bool:
        """See `LayerStack`."""
        is_current = self.layers.refresh(trained=trained)
        if self.generation != self.layers.generation:
            self.generation = self.layers.generation
            self.graphs.clear()
        return is_current

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """See `LayerStack`; waits for the kernels of the previous pack, on whichever stream they run."""
        if self.done is None:
            self.done = torch.cuda.Event()
        else:
            self.done.wait()
        try:
            yield
        finally:
            self.done.record()

    def __call__(self, tokens: Tensor, segments: Segments, rope: Rope | None) -> Tensor:
        """`(capacity, D)` to `(capacity, D)`, which the next call overwrites."""
        inputs = [tokens, segments.cu_seqlens, *(() if rope is None else (rope.cos, rope.sin))]
        if segments.windows is not None:
            inputs.append(segments.windows.cu_seqlens)
        if not self.inputs:
            self.inputs = [tensor.clone() for tensor in inputs]
        for static, tensor in zip(self.inputs, inputs, strict=True):
            if static is not tensor:
                static.copy_(tensor)
        if segments.max_seqlen not in self.graphs:
            saved = tokens.clone()  # the run before the recording may overwrite them
            self.graphs[segments.max_seqlen] = self._record(segments, rope)
            self.inputs[0].copy_(saved)
        graph, output = self.graphs[segments.max_seqlen]
        graph.replay()
        return output

    @property
    def static_input(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`(capacity, D)` static input of the graphs; `None` before the first call."""
        return self.inputs[0] if self.inputs else None

    def _record(self, segments: Segments, rope: Rope | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        tokens, cu_seqlens, *cos_sin = self.inputs
        windows = segments.windows
        if windows is not None:
            windows = dataclasses.replace(windows, cu_seqlens=cos_sin.pop())
        static_segments = dataclasses.replace(segments, cu_seqlens=cu_seqlens, windows=windows)
        static_rope = None if rope is None else Rope(rope.apply, *cos_sin)
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # the first run may compile or allocate, which a recording must not
            self.layers(tokens, static_segments, static_rope)
        torch.cuda.current_stream().wait_stream(self.stream)
        graph, pool = torch.cuda.CUDAGraph(), next((graph.pool() for graph, _ in self.graphs.values()), None)
        # Other threads may use the GPU meanwhile: by default their calls would end the recording, and fail themselves.
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            output = self.layers(tokens, static_segments, static_rope)
        return graph, output

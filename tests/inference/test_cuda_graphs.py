"""CUDA graphs: every pack is computed from its own values.

A stand-in for CUDA's graph runs the layers again on the recorded memory.
"""

from contextlib import contextmanager

import pytest
import torch

from nopad.inference.cuda_graphs import CUDAGraphLayers
from nopad.inference.layer_stack import LayerStack
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.segments import Segments, Windows


class Recorder(LayerStack):
    """Layers that read all inputs, and store the inputs and output of the last call."""

    def __call__(self, tokens, segments, rope):
        starts = segments.cu_seqlens[: len(tokens)].float()[:, None]
        output = tokens * 2 + starts + rope.cos[:, 0] - rope.sin[:, 0] + segments.max_seqlen
        if segments.windows is not None:
            output = output + 10 * segments.windows.cu_seqlens[:-1].float()[:, None] + segments.windows.max_seqlen
        self.recorded = tokens, segments, rope, output
        tokens.fill_(7.0)  # as layers that add in place do
        return output


class Stream:
    def wait_stream(self, other):
        pass


@contextmanager
def use(stream):
    yield


@pytest.fixture
def layers(monkeypatch):
    """Layers whose recording can be replayed on a CPU."""
    layers = Recorder()
    layers.made, layers.streams = [], []

    def make():
        layers.made.append(Stream())
        return layers.made[-1]

    class Graph:
        def replay(self):
            *arguments, output = self.recorded
            output.copy_(Recorder()(*arguments))

        def pool(self):
            return None

    @contextmanager
    def record(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads may use the GPU
        yield
        layers.streams.append(stream)
        graph.recorded = layers.recorded

    stand_ins = {"CUDAGraph": Graph, "graph": record, "Stream": make, "stream": use, "current_stream": Stream}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return layers


def draw(lengths, max_seqlen, windows=None):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rope = Rope(apply_rotary, torch.randn(4, 1, 4), torch.randn(4, 1, 4))
    if windows is not None:
        of_windows = Segments.of(windows, "cpu")
        windows = Windows(of_windows.lengths, of_windows.cu_seqlens, 2, stride=1)
    return torch.randn(4, 4), Segments(tuple(lengths), offsets, max_seqlen, windows), rope


def expected_of(tokens, segments, rope):
    return Recorder()(tokens.clone(), segments, rope)


def test_every_pack_is_computed_from_its_own_values(layers):
    graphs = CUDAGraphLayers(layers)
    for lengths, max_seqlen in (([1, 1, 2], 2), ([2, 1, 1], 2), ([1, 2, 1], 4), ([2, 1, 1], 2)):
        inputs = draw(lengths, max_seqlen)
        tokens = inputs[0].clone()
        torch.testing.assert_close(graphs(*inputs), expected_of(*inputs))
        assert torch.equal(inputs[0], tokens)
    assert sorted(graphs.graphs) == [2, 4]
    # One stream of their own: torch's is on the GPU of the first capture, and graphs of one stream share memory.
    assert len(layers.made) == 1
    assert layers.streams == layers.made * 2


def test_windows_of_every_pack_are_its_own(layers):
    graphs = CUDAGraphLayers(layers)
    for lengths, max_seqlen, windows in (
        ([1, 1, 1, 1], 4, [1, 1, 1, 1]),
        ([2, 2, 0, 0], 4, [2, 0, 1, 1]),
        ([2, 2, 0, 0], 2, [1, 1, 2, 0]),
        ([3, 1, 0, 0], 4, [2, 1, 1, 0]),
    ):
        inputs = draw(lengths, max_seqlen, windows)
        torch.testing.assert_close(graphs(*inputs), expected_of(*inputs))
    assert sorted(graphs.graphs) == [2, 4]  # windows add none


def test_tokens_in_the_static_input_are_not_copied(layers):
    graphs = CUDAGraphLayers(layers)
    assert graphs.static_input is None
    graphs(*draw([1, 1, 2], 2))
    assert graphs.static_input is graphs.inputs[0]
    for max_seqlen in (2, 4):  # the second is recorded with tokens that already lie in the static input
        tokens, segments, rope = draw([1, 1, 2], max_seqlen)
        output = graphs(graphs.static_input.copy_(tokens), segments, rope)
        torch.testing.assert_close(output, expected_of(tokens, segments, rope))


def test_exclusive_waits_for_the_kernels_of_the_previous_pack(monkeypatch):
    events = []

    class Event:
        def record(self):
            events.append(("recorded", self))

        def wait(self):
            events.append(("waited", self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    graphs = CUDAGraphLayers(Recorder())
    for _ in range(2):
        with graphs.exclusive():
            events.append("ran")
    assert events == ["ran", ("recorded", graphs.done), ("waited", graphs.done), "ran", ("recorded", graphs.done)]


def test_graphs_of_another_generation_are_recorded_again(layers):
    """A graph reads the addresses of the tensors that it was recorded with."""
    graphs = CUDAGraphLayers(layers)
    graphs.graphs = {16: None}
    assert graphs.refresh()
    assert 16 in graphs.graphs
    layers.generation += 1
    assert graphs.refresh()
    assert graphs.graphs == {}

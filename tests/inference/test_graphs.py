"""Recorded layers: each pack's own values reach them.

CUDA's graph is a stand-in that runs the layers again, on the memory that was recorded, as CUDA does.
"""

from contextlib import contextmanager

import pytest
import torch

from nopad.inference.cuda_graphs import Graphs
from nopad.inference.ready import ReadyLayers
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.segments import Segments


class Recorder(ReadyLayers):
    """Layers that use all that they are given, and remember what they were recorded with and where they wrote."""

    def __call__(self, tokens, segments, rope):
        starts = segments.cu_seqlens[: len(tokens)].float()[:, None]
        output = tokens * 2 + starts + rope.cos[:, 0] - rope.sin[:, 0] + segments.max_seqlen
        self.recorded = tokens, segments, rope, output
        tokens.fill_(7.0)  # as layers do that add in place
        return output


class Stream:
    def wait_stream(self, other):
        pass


@contextmanager
def use(stream):
    yield


@pytest.fixture
def layers(monkeypatch):
    """Layers, where a recording can be replayed on a CPU."""
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
    def record(graph, pool, stream):
        yield
        layers.streams.append(stream)
        graph.recorded = layers.recorded

    stand_ins = {"CUDAGraph": Graph, "graph": record, "Stream": make, "stream": use, "current_stream": Stream}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return layers


def draw(lengths, max_seqlen):
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rotation = Rope(apply_rotary, torch.randn(4, 1, 4), torch.randn(4, 1, 4))
    return torch.randn(4, 4), Segments(tuple(lengths), offsets, max_seqlen), rotation


def result(tokens, segments, rotation):
    return Recorder()(tokens.clone(), segments, rotation)


def test_every_pack_is_computed_from_its_own_values(layers):
    graphs = Graphs(layers)
    for lengths, longest in (([1, 1, 2], 2), ([2, 1, 1], 2), ([1, 2, 1], 4), ([2, 1, 1], 2)):
        given = draw(lengths, longest)
        kept = given[0].clone()
        torch.testing.assert_close(graphs(*given), result(*given))
        assert torch.equal(given[0], kept)
    assert sorted(graphs.graphs) == [2, 4]
    # Not torch's own, which is on the GPU that something was recorded on first; one, so that they share their memory.
    assert len(layers.made) == 1
    assert layers.streams == layers.made * 2


def test_tokens_that_were_written_where_the_graph_reads_them_are_not_copied(layers):
    graphs = Graphs(layers)
    assert graphs.static_input is None
    graphs(*draw([1, 1, 2], 2))
    assert graphs.static_input is graphs.inputs[0]
    for longest in (2, 4):  # the last is recorded with tokens that already lie there
        tokens, segments, rotation = draw([1, 1, 2], longest)
        torch.testing.assert_close(
            graphs(graphs.static_input.copy_(tokens), segments, rotation), result(tokens, segments, rotation)
        )


def test_a_turn_waits_for_the_kernels_of_the_one_before(monkeypatch):
    told = []

    class Event:
        def record(self):
            told.append(("recorded", self))

        def wait(self):
            told.append(("waited", self))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    graphs = Graphs(Recorder())
    for _ in range(2):
        with graphs.exclusive():
            told.append("ran")
    assert told == ["ran", ("recorded", graphs.done), ("waited", graphs.done), "ran", ("recorded", graphs.done)]

"""`compile_for_training` and `checkpoint_mlps`: gradients as without them, and one graph for all packs."""

import copy
import functools

import pytest
import torch
from tiny_encoders import DISTINCT, GRIDS, patches_of, tiny
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel

import nopad
from nopad.kernels.attention import varlen_attention
from nopad.segments import Segments

PACKS = (GRIDS, GRIDS[:2], GRIDS[1:])
CAPACITY, MAX_SEGMENTS = 96, 8


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Counts the graphs of forward and backward; these run as traced, without a compiler."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


def gradients(encoder, grids) -> dict[str, torch.Tensor]:
    encoder.zero_grad()
    torch.manual_seed(0)  # DINOv3 draws the scale of its coordinates in training
    output = encoder.encode(patches_of(encoder, grids), grids)
    (output.tokens.square().mean() + output.pooled.sin().mean()).backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", DISTINCT)
def test_one_graph_gives_the_gradients_of_every_pack(family, tmp_path, graphs):
    encoder = nopad.load(tiny(family, tmp_path)).train()
    expected = [gradients(encoder, grids) for grids in PACKS]
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    for grids, expected_gradients in zip(PACKS, expected, strict=True):
        torch.testing.assert_close(gradients(encoder, grids), expected_gradients, rtol=1e-4, atol=1e-6)
        assert graphs.frame_count == len({layer.attention.windowed for layer in encoder.layers})
    assert encoder.execution == "compiled"


def test_a_pack_without_gradients_is_compiled_too(tmp_path, graphs):
    encoder = nopad.load(tiny("siglip2", tmp_path))
    with torch.no_grad():
        expected = encoder(patches_of(encoder, GRIDS), GRIDS)
        encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
        torch.testing.assert_close(encoder(patches_of(encoder, GRIDS), GRIDS), expected)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("family", ["aimv2", "dinov3"])
def test_hidden_states_are_those_of_the_compiled_layers(family, tmp_path, graphs):
    still = {"pos_embed_rescale": None} if family == "dinov3" else {}  # drawn at random in training
    encoder = nopad.load(tiny(family, tmp_path, **still)).train()

    def run(grids):
        encoder.zero_grad()
        states = encoder.encode(patches_of(encoder, grids), grids, output_hidden_states=True).hidden_states
        states[-2].square().mean().backward()
        first, last = (encoder.layers[index].mlp.down.weight.grad for index in (0, -1))
        assert last is None
        return states, first.clone()

    expected = [run(grids) for grids in PACKS]
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    for grids, expected_of_pack in zip(PACKS, expected, strict=True):
        torch.testing.assert_close(run(grids), expected_of_pack, rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 1
    assert encoder.encode(patches_of(encoder), GRIDS).hidden_states is None


@pytest.mark.parametrize("way", ["layers", "whole"])
def test_torch_compile_with_dynamic_shapes_gives_the_gradients_of_every_pack(way, tmp_path, graphs):
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    expected = [gradients(encoder, grids) for grids in PACKS]
    if way == "layers":
        for layer in encoder.layers:
            layer.compile(dynamic=True, fullgraph=True, backend=graphs)
    else:
        PreTrainedModel.compile(encoder, dynamic=True, backend=graphs)
    counts = []
    for grids, expected_gradients in zip(PACKS, expected, strict=True):
        torch.testing.assert_close(gradients(encoder, grids), expected_gradients, rtol=1e-4, atol=1e-6)
        counts.append(graphs.frame_count)
    assert counts[0] > 0
    if way == "layers":  # without a break, and for all packs
        assert counts[0] == counts[-1] <= len(encoder.layers)


def test_packs_beyond_the_capacity_run_eagerly(tmp_path, graphs, caplog):
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    expected = gradients(encoder, GRIDS)
    encoder.compile_for_training(49, MAX_SEGMENTS)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(encoder, GRIDS).items())
    assert graphs.frame_count == 0
    assert "exceeds the compiled capacity of 49 tokens" in caplog.text


def test_execution_is_eager_where_torch_compiles_nothing(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    with torch.compiler.set_stance("force_eager"):
        gradients(encoder, GRIDS)
    assert encoder.execution == "eager"


@pytest.mark.parametrize("hidden_states", [False, True])
def test_execution_is_that_of_the_last_pack(hidden_states, tmp_path, graphs):
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    options = {"output": "all", "output_hidden_states": True} if hidden_states else {}
    for stance, execution in (("force_eager", "eager"), ("default", "compiled"), ("force_eager", "eager")):
        with torch.compiler.set_stance(stance):
            encoder(patches_of(encoder), GRIDS, **options)
        assert encoder.execution == execution


def test_compiling_leaves_names_and_copies_alone(tmp_path, graphs):
    encoder = nopad.load(tiny("dinov3", tmp_path)).train()
    names = list(encoder.state_dict())
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    gradients(encoder, GRIDS)
    assert list(encoder.state_dict()) == names
    assert copy.deepcopy(encoder).execution == "eager"
    assert encoder.compiled_capacity == CAPACITY
    encoder.uncompile()
    assert encoder.compiled_capacity is None


@pytest.mark.parametrize("family", ["aimv2", "dinov2"])
def test_checkpointed_mlps_give_the_same_gradients_from_fewer_saved_tensors(family, tmp_path, graphs):
    encoder = nopad.load(tiny(family, tmp_path)).train()
    saved = {}

    def measure(key):
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = gradients(encoder, GRIDS)
        saved[key] = sum(storages.values())
        return result

    expected = measure("all")
    encoder.checkpoint_mlps()
    for name, gradient in measure("checkpointed").items():
        assert torch.equal(gradient, expected[name]), name
    assert saved["checkpointed"] < saved["all"]
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    torch.testing.assert_close(gradients(encoder, GRIDS), expected, rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 1
    assert encoder.execution == "compiled"


def test_hooks_run_and_whole_layers_are_checkpointed_in_compiled_layers(tmp_path, graphs):
    encoder = nopad.load(tiny("aimv2", tmp_path)).train()
    expected = gradients(encoder, GRIDS)
    shapes = []
    encoder.layers[0].mlp.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    encoder.activation_checkpointing_enable()
    encoder.compile_for_training(CAPACITY, MAX_SEGMENTS)
    torch.testing.assert_close(gradients(encoder, GRIDS), expected, rtol=1e-4, atol=1e-6)
    assert (CAPACITY, encoder.hidden_size) in shapes
    assert encoder.execution == "compiled"


def test_encoders_without_gradients_are_refused(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path))
    with pytest.raises(ValueError, match="capacity ≥ 1 and max_segments ≥ 1, got 0 and 1"):
        encoder.compile_for_training(0)
    encoder.to_precision("fp8")
    with pytest.raises(ValueError, match="precision 'fp8': is for inference and has no gradients"):
        encoder.compile_for_training(CAPACITY)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_in_a_graph_has_the_gradients_of_eager_attention(backend, graphs):
    query, key, value = torch.randn(3, 11, 2, 8, dtype=torch.float64, requires_grad=True).unbind()
    segments = Segments.of([3, 0, 7, 1], "cpu")

    def attend(query, key, value):
        return varlen_attention(query, key, value, segments, scale=0.3, backend=backend)

    def gradients_of(function):
        return torch.autograd.grad(function(query, key, value).sin().sum(), (query, key, value))

    torch.testing.assert_close(gradients_of(torch.compile(attend, fullgraph=True)), gradients_of(attend))
    assert graphs.frame_count == 1

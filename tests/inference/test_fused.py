"""Fused layers: the plain ones' features, their weights left alone, folded anew when they change.

On a GPU (`-m gpu`): quack's products beside the plain ones, and compiled encoders beside those that are not.
"""

from importlib import util
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, GRIDS, WIDE, patches_of, relative, tiny
from torch import nn

import nopad
from nopad.inference import fused
from nopad.inference.fused import FusedBlock, FusedLayers, PlainProducts, QuackProducts, fuses, obstacle
from nopad.inference.static import Graphs, run_layers
from nopad.layout import Segments

CAPACITY, SLOTS = 160, 9
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
NEEDS_QUACK = pytest.mark.skipif(
    util.find_spec("quack") is None
    or not torch.cuda.is_available()
    or torch.cuda.get_device_capability()[0] != 9,  # a condition is evaluated without a GPU, too
    reason="needs quack on a Hopper GPU: pip install 'nopad[hopper]'",
)


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"))


@pytest.fixture
def plain_products(monkeypatch):
    """Fuses on a CPU, in any dtype."""
    monkeypatch.setattr(fused, "obstacle", lambda *arguments: None)
    monkeypatch.setattr(fused, "QuackProducts", PlainProducts)


def tokens_of(encoder, *lengths):
    return torch.randn(sum(lengths), encoder.hidden_size).to(encoder.dtype), Segments.of(lengths, "cpu")


@torch.no_grad()
def test_features_are_those_of_the_layers(encoder):
    tokens, segments = tokens_of(encoder, 20, 1, 37)
    expected = run_layers(list(encoder.layers), tokens, segments, None)
    assert relative(FusedLayers(encoder.layers, PlainProducts())(tokens, segments, None), expected) < 1e-5


@torch.no_grad()
def test_in_half_precision_they_are_as_close_to_float32_as_the_layers(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **WIDE))
    tokens, segments = tokens_of(encoder, *[64] * 16)
    exact = run_layers(list(encoder.layers), tokens, segments, None)
    layers, tokens = encoder.to(torch.bfloat16).layers, tokens.to(torch.bfloat16)
    own = relative(run_layers(list(layers), tokens, segments, None), exact)
    assert own > 1e-3
    assert relative(FusedLayers(layers, PlainProducts())(tokens, segments, None), exact) <= 1.1 * own


@torch.no_grad()
def test_four_products_make_a_layer(encoder):
    seen = []

    class Noted(PlainProducts):
        def normed(self, tokens, rstd, weight):
            seen.append(("normed", tokens.shape, rstd.shape, weight.shape))
            return super().normed(tokens, rstd, weight)

        def gated(self, tokens, rstd, weight):
            seen.append(("gated", tokens.shape, rstd.shape, weight.shape))
            return super().gated(tokens, rstd, weight)

        def added(self, states, weight, residual, eps):
            seen.append(("added", states.shape, residual.shape, weight.shape))
            return super().added(states, weight, residual, eps)

    FusedLayers(encoder.layers, Noted())(*tokens_of(encoder, 5, 4), None)
    layer = [
        ("normed", (9, 32), (9,), (96, 32)),
        ("added", (9, 32), (9, 32), (32, 32)),
        ("gated", (9, 32), (9,), (96, 32)),
        ("added", (9, 48), (9, 32), (32, 48)),
    ]
    assert seen == 3 * layer


@torch.no_grad()
def test_plain_products_are_what_they_are_said_to_be():
    products, tokens, rstd = PlainProducts(), torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert products.normed(tokens, rstd, weight).tolist() == [[1.0, 3.0]]
    silu = 1 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(products.gated(tokens, rstd, weight), torch.tensor([[3 * silu]]))  # gate 1, up 3
    total, rstd = products.added(tokens, weight, torch.tensor([[-2.0, -2.0]]), 0.0)
    assert total.tolist() == [[0.0, 4.0]]
    torch.testing.assert_close(rstd, torch.tensor([8.0]).rsqrt())


def test_what_is_fused(tmp_path):
    for number, family in enumerate(FAMILIES):
        (kind,) = {fuses(layer) for layer in nopad.load(tiny(family, tmp_path / str(number))).layers}
        assert kind == family.startswith("aimv2")
    for number, changes in enumerate(({"qkv_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"})):
        encoder = nopad.load(tiny("aimv2", tmp_path / f"changed {number}", **changes))
        assert not any(fuses(layer) for layer in encoder.layers)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "layer_scale1", nn.Parameter(torch.ones(32))),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm(32)),
        lambda layer: setattr(layer.norm1, "eps", 1e-3),
        lambda layer: setattr(layer.attention, "proj", nn.Linear(32, 32)),
    ],
)
def test_one_other_part_and_a_block_is_not_fused(encoder, spoil):
    layer = encoder.layers[0]
    assert fuses(layer)
    spoil(layer)
    assert not fuses(layer)


def test_layers_in_float8_are_not_fused(encoder):
    encoder.to_precision("fp8")
    assert not any(fuses(layer) for layer in encoder.layers)


def test_reasons_against(encoder, tmp_path, monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    reason = obstacle(encoder.layers, torch.device("cpu"), bf16)
    assert reason == "the fused products are for bfloat16 on a Hopper GPU, not for torch.bfloat16 on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "not for torch.bfloat16 on cuda" in obstacle(encoder.layers, cuda, bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "not for torch.float32 on cuda" in obstacle(encoder.layers, cuda, torch.float32)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert obstacle(encoder.layers, cuda, bf16) == "quack is not installed: pip install 'nopad[hopper]'"
    monkeypatch.setattr(util, "find_spec", lambda name: SimpleNamespace(name=name))
    assert obstacle(encoder.layers, cuda, bf16) is None
    other = nopad.load(tiny("siglip2", tmp_path / "siglip2"))
    assert "only blocks with RMSNorm" in obstacle(other.layers, cuda, bf16)


@torch.no_grad()
def test_changed_weights_are_folded_once_into_the_same_tensors(encoder, monkeypatch):
    layers = FusedLayers(encoder.layers, PlainProducts())
    places = [weight.data_ptr() for block in layers.blocks for weight in (block.qkv, block.gate_up)]
    of, folded = FusedBlock.of, []
    monkeypatch.setattr(FusedBlock, "of", lambda layer: folded.append(layer) or of(layer))
    layers.refresh()
    assert folded == []
    encoder.layers[1].norm1.weight.mul_(3.0)
    encoder.layers[2].mlp.down.weight.mul_(-1.0)
    for _ in range(3):
        layers.refresh()
    assert folded == list(encoder.layers)
    assert [weight.data_ptr() for block in layers.blocks for weight in (block.qkv, block.gate_up)] == places
    tokens, segments = tokens_of(encoder, 20, 1)
    expected = run_layers(list(encoder.layers), tokens, segments, None)
    assert relative(layers(tokens, segments, None), expected) < 1e-5


@torch.no_grad()
def test_static_packs_run_fused_layers(encoder, plain_products):
    expected = encoder.encode(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution == "fused"
    found = encoder.encode(patches_of(encoder), GRIDS)
    assert relative(found.tokens, expected.tokens) < 1e-5
    assert not torch.equal(found.tokens, expected.tokens)
    assert relative(found.pooled, expected.pooled) < 1e-5


@torch.no_grad()
def test_weights_may_change_where_graphs_have_been_recorded(encoder, plain_products, monkeypatch):
    monkeypatch.setattr(Graphs, "__call__", lambda self, *arguments: self.layers(*arguments))
    encoder.compile(CAPACITY, SLOTS)
    encoder._static.layers = Graphs(encoder._static.layers)
    assert encoder.execution == "fused"
    encoder.layers[0].norm2.weight.mul_(2.0)
    found = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(found, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_folding_leaves_what_is_saved_and_trained_alone(encoder, plain_products, tmp_path):
    encoder.save_pretrained(tmp_path / "before")
    encoder.compile(CAPACITY, SLOTS)
    with torch.no_grad():
        encoder(patches_of(encoder), GRIDS)
    encoder.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    encoder(patches_of(encoder), GRIDS).sum().backward()
    assert encoder.layers[0].norm1.weight.grad.abs().sum() > 0


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize("rows", [256, 1000])
def test_quacks_products_are_the_plain_ones(rows):
    def draw(*shape):
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    size, inner = 1024, 2816
    tokens, rstd, residual = draw(rows, size), torch.rand(rows, device="cuda") + 0.5, draw(rows, size)
    plain, quack = PlainProducts(), QuackProducts()
    for name, out in (("normed", 3 * size), ("gated", 2 * inner)):
        weight = draw(out, size) * size**-0.5
        arguments = tokens, rstd, weight
        assert relative(getattr(quack, name)(*arguments), getattr(plain, name)(*arguments)) < 2e-2
    for states in (tokens, draw(rows, inner)):
        weight = draw(size, states.shape[1]) * states.shape[1] ** -0.5
        found, expected = (products.added(states, weight, residual, 1e-5) for products in (quack, plain))
        assert relative(found[0], expected[0]) < 2e-2
        assert found[1].shape == expected[1].shape
        assert relative(found[1], expected[1]) < 2e-2


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
def test_fused_layers_are_as_close_to_float32_as_the_layers(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8}
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **sizes), device="cuda")
    grids = torch.tensor([[1, 16, 16]] * 4)
    patches = patches_of(encoder, grids)
    exact = encoder(patches, grids)
    encoder = encoder.to(torch.bfloat16)
    own = relative(encoder(patches.to(torch.bfloat16), grids), exact)
    encoder.compile(2048)
    assert encoder.execution == "fused"
    assert relative(encoder(patches.to(torch.bfloat16), grids), exact) <= 1.1 * own
    encoder.layers[1].norm1.weight.mul_(3.0)  # the recorded graph sees it
    found = encoder(patches.to(torch.bfloat16), grids)
    encoder.uncompile()
    assert relative(found, encoder(patches.to(torch.bfloat16), grids)) < 2e-2


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_on_a_gpu(tmp_path, family):
    encoder = nopad.load(tiny(family, tmp_path / "wide", **WIDE), device="cuda", dtype=torch.bfloat16)
    patches = patches_of(encoder)
    eager = encoder.encode(patches, GRIDS)
    encoder.compile(CAPACITY, SLOTS)
    assert encoder.execution in ("compiled", "fused")
    compiled = encoder.encode(patches, GRIDS)
    for name in ("tokens", "pooled"):
        assert relative(getattr(compiled, name), getattr(eager, name)) < 2e-2

"""Conversion to float8: what is converted, what keeps its dtype, and what cannot be converted."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import DISTINCT, FAMILIES, GRIDS, JUNK, WIDE, is_batch_invariant, patches_of, tiny
from torch import nn

import nopad
from nopad.inference.float8.convert import absorb_norms
from nopad.inference.float8.modules import Float8GatedMLP, Float8Linear, Float8QKV
from nopad.layers.linear import joined
from nopad.layers.roles import registered_path
from nopad.segments import Segments

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CAPACITY, MAX_SEGMENTS = 160, 9


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return tiny(request.param, tmp_path / "checkpoint")


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp8")


@torch.no_grad()
def test_every_family_is_close_to_the_original_dtype(folder):
    plain, encoder = nopad.load(folder), nopad.load(folder, precision="fp8")
    assert (encoder.precision, plain.precision) == ("fp8", None)
    # Output projections, and the values of the first half of the blocks, keep their dtype.
    unconverted = {name for name, module in encoder.layers.named_modules() if isinstance(module, nn.Linear)}
    attentions = [registered_path(layer, "attention") for layer in encoder.layers]
    proj = registered_path(encoder.layers[0].attention, "proj")
    first = {f"{number}.{name}.qkv.value" for number, name in enumerate(attentions[:2])}
    assert unconverted == {f"{number}.{name}.{proj}" for number, name in enumerate(attentions)} | first
    half = nopad.load(folder, dtype=torch.bfloat16, precision="fp8")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert encoder.embeddings.proj.weight.dtype == torch.float32
    expected = plain.encode(patches_of(plain), GRIDS, output_hidden_states=True)
    output = encoder.encode(patches_of(encoder), GRIDS, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], expected.hidden_states[0])
    for name in ("tokens", "pooled"):
        cosine = torch.cosine_similarity(getattr(output, name), getattr(expected, name), dim=-1)
        assert 0.98 < cosine.min() < 0.99999


@torch.no_grad()
def test_absorb_norms_keeps_the_layer_and_bounds_the_input_of_down(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
    layer, rows = encoder.layers[0], 30 * torch.randn(200, 32)
    segments = Segments.of([200], "cpu")
    expected = layer(rows, segments)
    attention, mlp = layer.attention, layer.mlp
    qkv, gate_up = joined((attention.q, attention.k, attention.v)), joined((mlp.gate, mlp.up))
    absorb_norms(layer, qkv, gate_up)
    for module, name, weight in zip(
        (attention, attention, attention, mlp, mlp),
        ("q", "k", "v", "gate", "up"),
        (*qkv.weight.chunk(3), *gate_up.weight.chunk(2)),
        strict=True,
    ):
        getattr(module, name).weight.copy_(weight)
    torch.testing.assert_close(layer(rows, segments), expected)
    assert not [*layer.norm1.parameters(), *layer.norm2.parameters()]
    # The worst case of a normed row lies between a gate and its up, or its negative.
    gate, up = gate_up.weight.chunk(2)
    for sign in (1, -1):
        worst = F.normalize(F.normalize(gate, dim=1) + sign * F.normalize(up, dim=1), dim=1) * 32**0.5
        product = (worst * gate).sum(dim=1) * (worst * up).sum(dim=1)
        assert product.abs().max() <= 448
    factors = layer.mlp.down.weight / nopad.load(tmp_path / "aimv2").layers[0].mlp.down.weight
    assert torch.equal(factors.log2(), factors.log2().round())


@torch.no_grad()
def test_dead_gates_and_ups_stay_finite(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
    for layer in encoder.layers:
        layer.norm2.weight.fill_(2.0)
        layer.mlp.gate.weight[:4] = 0
        layer.mlp.up.weight[12:22] = 0
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.to_precision("fp8")
    output = encoder(patches_of(encoder), GRIDS)
    assert torch.cosine_similarity(output, expected, dim=1).min() > 0.95


def test_joint_weights_of_the_checkpoint_are_let_go(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
    attention = encoder.layers[0].attention
    joint = weakref.ref(attention._stacked.weight)
    encoder.to_precision("fp8")
    gc.collect()
    assert joint() is None


def test_heads_and_projections_are_not_converted(tmp_path):
    for folder in (tiny("siglip2", tmp_path / "siglip2"), tiny("aimv2 with a head", tmp_path / "aimv2")):
        plain, encoder = nopad.load(folder), nopad.load(folder, precision="fp8")
        for name, parameter in plain.head.named_parameters():
            assert torch.equal(encoder.head.get_parameter(name), parameter)


@torch.no_grad()
def test_batch_invariance(folder):
    encoder = nopad.load(folder, precision="fp8")
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    assert all(is_batch_invariant(encoder, added) for added in JUNK)


def test_unsupported_sizes_leave_the_encoder_unchanged(tmp_path):
    folder = tiny("aimv2", tmp_path / "aimv2", intermediate_size=40)
    encoder = nopad.load(folder)
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    with torch.no_grad():
        expected = encoder(patches_of(encoder), GRIDS)
    with pytest.raises(ValueError, match="multiples of 16, got a linear layer of 32 to 40"):
        encoder.to_precision("fp8")
    assert encoder.precision is None
    assert encoder.compiled_capacity == CAPACITY
    assert not any(isinstance(module, Float8Linear | Float8GatedMLP) for module in encoder.modules())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)
    encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="multiples of 16"):
        nopad.load(folder, precision="fp8")


@pytest.mark.parametrize("change", ["parametrized", "another forward"])
@pytest.mark.parametrize("part", ["attention.q", "attention.v", "mlp.gate", "mlp.down"])
@pytest.mark.parametrize("number", [0, 1])
def test_unsupported_layers_leave_the_encoder_unchanged(tmp_path, change, part, number):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
    linear = encoder.layers[number].get_submodule(part)
    if change == "parametrized":
        nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    else:
        lora = type("Lora", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})
        encoder.layers[number].set_submodule(
            registered_path(encoder.layers[number], part), lora(linear.in_features, linear.out_features, bias=False)
        )
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="expected linear layers with a floating-point weight"):
        encoder.to_precision("fp8")
    after = encoder.state_dict()
    assert encoder.precision is None
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("layers", "expected"), [(7, [0, 1, 2, 3]), (4, [0, 1])])
def test_values_of_the_first_half_of_the_blocks_keep_their_dtype(tmp_path, layers, expected):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2", num_hidden_layers=layers), precision="fp8")
    unconverted = [number for number, layer in enumerate(encoder.layers) if isinstance(layer.attention.qkv, Float8QKV)]
    assert unconverted == expected


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("aimv2", {"mlp_bias": True}),
        ("aimv2", {"qkv_bias": True}),
        ("dinov3 gated", {"mlp_bias": False, "proj_bias": False, "query_bias": False, "value_bias": False}),
    ],
)
def test_blocks_with_biases_are_converted(tmp_path, family, changes):
    folder = tiny(family, tmp_path / "changed", **changes)
    plain, encoder = nopad.load(folder), nopad.load(folder)
    for model in (plain, encoder):
        for layer in model.layers:
            for norm in (layer.norm1, layer.norm2):
                norm.weight.mul_(torch.linspace(0.3, 3.0, len(norm.weight)))
                if isinstance(norm, nn.LayerNorm):
                    norm.bias.copy_(torch.linspace(-1.0, 1.0, len(norm.bias)))
    encoder.to_precision("fp8")
    output, expected = (model(patches_of(model), GRIDS) for model in (encoder, plain))
    assert torch.cosine_similarity(output, expected, dim=1).min() > 0.99


@torch.no_grad()
def test_second_conversion_changes_nothing(encoder):
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.to_precision("fp8")
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["aimv2", "siglip2", "dinov3"])
@pytest.mark.parametrize("target", ["attention.k", "attention.proj", "mlp.down"])
def test_adapters_leave_the_encoder_unchanged(tmp_path, family, target):
    peft = pytest.importorskip("peft", reason="peft is a development dependency")
    encoder = nopad.load(tiny(family, tmp_path / "checkpoint"))
    target = registered_path(encoder.layers[0], target)
    peft.get_peft_model(encoder, peft.LoraConfig(r=16, target_modules=[target])).eval()
    expected = encoder(patches_of(encoder), GRIDS)
    with pytest.raises(ValueError, match="merge it into its weight, or load the checkpoint with precision='fp8' first"):
        encoder.to_precision("fp8")
    assert encoder.precision is None
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)


@pytest.mark.parametrize("part", ["mlp", "mlp.down", "norm1", "attention.k"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_on_replaced_modules_raise(tmp_path, part, register):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
    hook = getattr(encoder.layers[1].get_submodule(part), register)(lambda *arguments: None)
    name = registered_path(encoder.layers[1], part)
    with pytest.raises(ValueError, match=rf"got one on layers\.1\.{name}; register it afterwards"):
        encoder.to_precision("fp8")
    hook.remove()
    seen = []
    for tap in (encoder.layers[1], encoder.layers[1].attention):
        tap.register_forward_hook(lambda *arguments: seen.append(arguments))
    encoder.to_precision("fp8")
    encoder(patches_of(encoder), GRIDS)
    assert len(seen) == 2


def assert_one_graph(encoder):
    """Each layer of an encoder is one graph for the compiler, not pieces with uncompiled code between them."""
    torch.compiler.reset()  # or graphs of other families count
    patches = patches_of(encoder)
    expected = encoder(patches, GRIDS)
    for layer in encoder.layers[:2]:
        layer.compile(backend="eager", fullgraph=True)
    assert torch.equal(encoder(patches, GRIDS), expected)


@torch.no_grad()
@pytest.mark.parametrize("folder", DISTINCT, indirect=True)
def test_every_layer_is_one_graph(folder):
    assert_one_graph(nopad.load(folder, precision="fp8"))


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
def test_every_layer_is_one_graph_on_a_gpu(folder):
    assert_one_graph(nopad.load(folder, device="cuda", dtype=torch.bfloat16, precision="fp8"))


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_on_a_gpu_are_close_to_eager(tmp_path, family):
    folder = tiny(family, tmp_path / "wide", **WIDE)
    plain = nopad.load(folder, device="cuda", dtype=torch.bfloat16)
    encoder = nopad.load(folder, device="cuda", dtype=torch.bfloat16, precision="fp8")
    patches = patches_of(encoder)
    eager = encoder.encode(patches, GRIDS)
    cosine = torch.cosine_similarity(eager.tokens.float(), plain(patches, GRIDS).float(), dim=-1)
    assert cosine.min() > 0.98
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution.startswith(("compiled", "fused by"))
    compiled = encoder.encode(patches, GRIDS)
    # Another order of addition may round a value to the other of two float8 neighbours.
    for name in ("tokens", "pooled"):
        cosine = torch.cosine_similarity(getattr(compiled, name).float(), getattr(eager, name).float(), dim=-1)
        assert cosine.min() > 0.99

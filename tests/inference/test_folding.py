"""Folded blocks: they compute what the blocks do, which blocks can be folded, in what order rows stand."""

import pytest
import torch
from tiny_encoders import FAMILIES, tiny
from torch import nn
from transformers.activations import ACT2FN

import nopad
from nopad.inference.float8 import FLOAT8, Float8Linear
from nopad.inference.fusion.folding import FoldedBlock, Matrix, by_head, can_fold, folded, in_turn, name_of, scaled
from nopad.layers.block import Block, LayerScale


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"))


def normal(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.RMSNorm(6), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norms_weight_and_bias_go_into_the_matrix_after_it(norm, bias):
    norm, linear, rows = normal(norm), normal(nn.Linear(6, 4, bias=bias)), torch.randn(3, 6)
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(dim=1, keepdim=True)
    matrix = folded(linear, norm)
    rstd = torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + (norm.eps or torch.finfo(torch.float32).eps))
    found = (rows * rstd) @ matrix.weight.T + (0 if matrix.bias is None else matrix.bias)
    torch.testing.assert_close(found, linear(norm(rows)))
    if isinstance(norm, nn.LayerNorm):  # what rounding leaves of a mean is taken away, too
        drifted = ((rows + 3) * rstd) @ matrix.weight.T + (0 if matrix.bias is None else matrix.bias)
        torch.testing.assert_close(drifted, found, rtol=1e-4, atol=1e-4)
    assert (matrix.bias is None) == (not bias and getattr(norm, "bias", None) is None)


@torch.no_grad()
def test_a_layer_scale_goes_into_the_matrix_before_it():
    linear, scale, rows = normal(nn.Linear(6, 4)), normal(LayerScale(4)), torch.randn(3, 6)
    matrix = scaled(linear, scale, centred=False)
    torch.testing.assert_close(rows @ matrix.weight.T + matrix.bias, scale(linear(rows)))


def test_a_matrix_that_nothing_is_folded_into_is_the_weight_itself():
    linear = normal(nn.Linear(6, 4)).to(torch.bfloat16)
    assert scaled(linear, None, centred=False).weight.data_ptr() == linear.weight.data_ptr()
    assert scaled(linear, None, centred=True).weight.data_ptr() != linear.weight.data_ptr()


@torch.no_grad()
def test_what_adds_to_centred_rows_has_a_mean_of_zero():
    linear, rows = normal(nn.Linear(6, 4)), torch.randn(3, 6)
    matrix = scaled(linear, None, centred=True)
    found = rows @ matrix.weight.T + matrix.bias
    torch.testing.assert_close(found, linear(rows) - linear(rows).mean(dim=1, keepdim=True))


def test_rows_are_rounded_once_to_the_weights_dtype():
    linear = normal(nn.Linear(6, 4)).to(torch.bfloat16)
    norm = normal(nn.RMSNorm(6)).to(torch.bfloat16)
    matrix = folded(linear, norm)
    assert (matrix.weight.dtype, matrix.bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(matrix.weight, (linear.weight.float() * norm.weight.float()).to(torch.bfloat16))


def test_order_of_rows():
    assert by_head(2, 2, None).tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]  # q, k and v of a head, of the next
    turned = by_head(1, 4, torch.tensor([0, 2, 1, 3]))
    assert turned.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]  # queries and keys, not values
    assert by_head(2, 2, None, parts=2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert in_turn(3).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_matrix_in_another_order():
    matrix = Matrix(torch.arange(6.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    found = matrix[torch.tensor([2, 0])]
    assert (found.weight.tolist(), found.bias.tolist(), found.scale.tolist()) == ([[4, 5], [0, 1]], [3, 1], [6, 4])
    eight = Matrix(matrix.weight.to(FLOAT8))[torch.tensor([2, 0])]
    assert (eight.weight.dtype, eight.weight.float().tolist()) == (FLOAT8, [[4, 5], [0, 1]])


def test_names_of_activations():
    names = [name_of(ACT2FN[name]) for name in ("silu", "gelu", "gelu_pytorch_tanh", "relu", "quick_gelu")]
    assert names == ["silu", "gelu", "gelu_tanh", None, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_can_be_folded(tmp_path, family):
    layers = nopad.load(tiny(family, tmp_path / "checkpoint")).layers
    assert all(can_fold(layer) for layer in layers)
    block = FoldedBlock.of(layers[0])
    assert block.centred == (not family.startswith("aimv2"))
    assert block.gated == ("aimv2" in family or "gated" in family)


def test_biases_can_be_folded(tmp_path):
    for number, changes in enumerate(({"qkv_bias": True}, {"mlp_bias": True})):
        encoder = nopad.load(tiny("aimv2", tmp_path / f"changed {number}", **changes))
        assert all(can_fold(layer) for layer in encoder.layers)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer, "layer_scale1", LayerScale(32)),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm(32, eps=layer.norm1.eps)),
        lambda layer: setattr(layer, "norm1", nn.Identity()),
        lambda layer: setattr(layer.norm1, "eps", 1e-3),
        lambda layer: setattr(layer.mlp, "activation", ACT2FN["gelu"]),
        lambda layer: setattr(layer.attention, "proj", nn.Identity()),
        lambda layer: setattr(layer.attention.k, "weight", nn.Parameter(torch.ones(32, 32).char(), False)),
        lambda layer: setattr(layer, "mlp", nn.Identity()),
        lambda layer: setattr(layer, "attention", nn.Identity()),
        lambda layer: setattr(layer, "norm1", nn.RMSNorm(32)),  # no eps of its own
        lambda layer: setattr(layer.attention.v, "forward", lambda states: 2 * states),
        lambda layer: setattr(layer.attention, "qkv", nn.Linear(32, 96)),
        lambda layer: setattr(layer.mlp, "down", type("Lora", (nn.Linear,), {"forward": len})(48, 32, bias=False)),
    ],
)
def test_one_other_part_and_a_block_cannot_be_folded(encoder, spoil):
    layer = encoder.layers[0]
    assert can_fold(layer)
    spoil(layer)
    assert not can_fold(layer)


def test_other_modules_cannot_be_folded(encoder):
    assert not can_fold(nn.Linear(2, 2))
    assert isinstance(encoder.layers[0], Block)


def test_in_float8_gated_blocks_without_biases_can_be_folded(tmp_path):
    for number, family in enumerate(FAMILIES):
        encoder = nopad.load(tiny(family, tmp_path / str(number)), precision="fp8")
        assert {can_fold(layer) for layer in encoder.layers} == {family.startswith("aimv2")}


def biased(linear):
    """The same map with a bias, whether it is float8 or not."""
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda layer: setattr(layer.attention, "qkv", type("Lora", (nn.Linear,), {"forward": len})(32, 96, bias=False)),
        lambda layer: setattr(layer.mlp, "gate_up", nn.Linear(32, 96, bias=False)),
        lambda layer: setattr(layer.mlp, "down", nn.Linear(48, 32, bias=False)),
        lambda layer: setattr(layer.attention, "proj", Float8Linear(layer.attention.proj)),
        lambda layer: biased(getattr(layer.attention.qkv, "query_key", layer.attention.qkv)),
        lambda layer: biased(getattr(layer.attention.qkv, "value", layer.attention.qkv)),
        lambda layer: biased(layer.attention.proj),
        lambda layer: biased(layer.mlp.gate_up),
        lambda layer: biased(layer.mlp.down),
    ],
)
@pytest.mark.parametrize("number", [0, 2])  # of which the first has its values in bfloat16
def test_in_float8_one_other_part_and_a_block_cannot_be_folded(tmp_path, spoil, number):
    layer = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp8").layers[number]
    assert can_fold(layer)
    spoil(layer)
    assert not can_fold(layer)


def test_in_float8_norms_that_are_still_there_cannot_be_folded(tmp_path):
    biases = {"mlp_bias": False, "proj_bias": False, "query_bias": False, "value_bias": False}
    encoder = nopad.load(tiny("dinov3 gated", tmp_path / "dinov3", **biases), precision="fp8")
    assert encoder.layers[0].mlp.down.bias is None
    assert not can_fold(encoder.layers[0])

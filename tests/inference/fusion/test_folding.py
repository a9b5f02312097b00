"""Folding: results against the block, which blocks can be folded, and row orders."""

import pytest
import torch
from tiny_encoders import FAMILIES, GRIDS, patches_of, relative, segments_of, tiny
from torch import nn
from transformers.activations import ACT2FN

import nopad
from nopad.inference.float8.modules import Float8Linear
from nopad.inference.fusion.cpu_linear import linear_class
from nopad.inference.fusion.folding import (
    FoldedBlock,
    GemmWeight,
    activation_name,
    can_fold,
    fold_layer_scale,
    fold_norm,
    interleave_gate_up,
    qkv_head_permutation,
)
from nopad.inference.fusion.gemm_reference import ReferenceGemm
from nopad.inference.fusion.layers import FusedLayers
from nopad.kernels.gemm_formats import FP8
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
def test_fold_norm_equals_norm_and_linear(norm, bias):
    norm, linear, rows = normal(norm), normal(nn.Linear(6, 4, bias=bias)), torch.randn(3, 6)
    if isinstance(norm, nn.LayerNorm):
        rows = rows - rows.mean(dim=1, keepdim=True)
    weight = fold_norm(linear, norm)
    rstd = torch.rsqrt(rows.square().mean(dim=1, keepdim=True) + (norm.eps or torch.finfo(torch.float32).eps))
    output = (rows * rstd) @ weight.weight.T + (0 if weight.bias is None else weight.bias)
    torch.testing.assert_close(output, linear(norm(rows)))
    if isinstance(norm, nn.LayerNorm):  # removes what rounding leaves of a mean
        drifted = ((rows + 3) * rstd) @ weight.weight.T + (0 if weight.bias is None else weight.bias)
        torch.testing.assert_close(drifted, output, rtol=1e-4, atol=1e-4)
    assert (weight.bias is None) == (not bias and getattr(norm, "bias", None) is None)


@torch.no_grad()
def test_fold_layer_scale_equals_linear_and_layer_scale():
    linear, scale, rows = normal(nn.Linear(6, 4)), normal(LayerScale(4)), torch.randn(3, 6)
    weight = fold_layer_scale(linear, scale, zero_mean=False)
    torch.testing.assert_close(rows @ weight.weight.T + weight.bias, scale(linear(rows)))


def test_fold_layer_scale_without_changes_shares_the_weight():
    linear = normal(nn.Linear(6, 4)).to(torch.bfloat16)
    assert fold_layer_scale(linear, None, zero_mean=False).weight.data_ptr() == linear.weight.data_ptr()
    assert fold_layer_scale(linear, None, zero_mean=True).weight.data_ptr() != linear.weight.data_ptr()


@torch.no_grad()
def test_fold_layer_scale_with_zero_mean_centres_outputs():
    linear, rows = normal(nn.Linear(6, 4)), torch.randn(3, 6)
    weight = fold_layer_scale(linear, None, zero_mean=True)
    output = rows @ weight.weight.T + weight.bias
    torch.testing.assert_close(output, linear(rows) - linear(rows).mean(dim=1, keepdim=True))


def test_fold_norm_rounds_once_to_the_dtype_of_the_weight():
    linear = normal(nn.Linear(6, 4)).to(torch.bfloat16)
    norm = normal(nn.RMSNorm(6)).to(torch.bfloat16)
    weight = fold_norm(linear, norm)
    assert (weight.weight.dtype, weight.bias.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(weight.weight, (linear.weight.float() * norm.weight.float()).to(torch.bfloat16))


def test_row_permutations():
    assert qkv_head_permutation(2, 2, None).tolist() == [
        0,
        1,
        4,
        5,
        8,
        9,
        2,
        3,
        6,
        7,
        10,
        11,
    ]  # q, k and v of one head, of the next
    with_rope = qkv_head_permutation(1, 4, torch.tensor([0, 2, 1, 3]))
    assert with_rope.tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]  # of queries and keys, not of values
    assert qkv_head_permutation(2, 2, None, num_parts=2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert interleave_gate_up(3).tolist() == [0, 3, 1, 4, 2, 5]


def test_gemm_weight_in_another_order():
    weight = GemmWeight(torch.arange(6.0).view(3, 2), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    output = weight[torch.tensor([2, 0])]
    assert (output.weight.tolist(), output.bias.tolist(), output.scale.tolist()) == ([[4, 5], [0, 1]], [3, 1], [6, 4])
    float8 = GemmWeight(weight.weight.to(FP8))[torch.tensor([2, 0])]
    assert (float8.weight.dtype, float8.weight.float().tolist()) == (FP8, [[4, 5], [0, 1]])


def test_activation_names():
    names = [activation_name(ACT2FN[name]) for name in ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu")]
    assert names == ["silu", "gelu", "gelu_tanh", "quick_gelu", None]


RMS_NORM = ("aimv2", "pixtral", "qwen2_5_vl")
"""Families with RMSNorm and gated layers."""


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families_can_be_folded(tmp_path, family):
    layers = nopad.load(tiny(family, tmp_path / "checkpoint")).layers
    assert all(can_fold(layer) for layer in layers)
    block = FoldedBlock.of(layers[0])
    assert block.zero_mean == (not family.startswith(RMS_NORM))
    assert block.gated == (family.startswith(RMS_NORM) or "gated" in family)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_feed_forward_widths_are_padded_to_whole_rows_of_16_bytes(tmp_path, family):
    """Qwen2.5-VL's is 3,420: a GEMM in half precision would read rows that begin anywhere."""
    encoder = nopad.load(tiny(family, tmp_path, intermediate_size=44))
    block = FoldedBlock.of(encoder.layers[0])
    assert block.down.weight.shape == (32, 48)
    assert block.up.weight.shape == (48 * (1 + block.gated), 32)
    assert not block.down.weight[:, 44:].any()
    segments = segments_of(encoder, 20, 9)
    tokens, rope = torch.randn(29, 32), encoder.example_rope(29)
    expected = tokens
    for layer in encoder.layers:
        expected = layer(expected, segments, rope)
    output = FusedLayers(encoder.layers, ReferenceGemm(), rope, centre=False)(tokens, segments, rope)
    assert relative(output, expected) < 1e-5
    before = encoder(patches_of(encoder), GRIDS)
    encoder.compile(160, 9)
    assert encoder.execution == f"fused by {linear_class(torch.float32).name}"
    assert relative(encoder(patches_of(encoder), GRIDS), before) < 1e-5


def test_biases_can_be_folded(tmp_path):
    for number, changes in enumerate(({"qkv_bias": True}, {"mlp_bias": True})):
        encoder = nopad.load(tiny("aimv2", tmp_path / f"changed {number}", **changes))
        assert all(can_fold(layer) for layer in encoder.layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "layer_scale1", LayerScale(32)),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm(32, eps=layer.norm1.eps)),
        lambda layer: setattr(layer, "norm1", nn.Identity()),
        lambda layer: setattr(layer.norm1, "eps", 1e-3),
        lambda layer: setattr(layer.mlp, "activation", ACT2FN["gelu"]),
        lambda layer: setattr(layer.mlp, "activation", ACT2FN["quick_gelu"]),  # of a gate
        lambda layer: setattr(layer.attention, "proj", nn.Identity()),
        lambda layer: setattr(layer.attention.k, "weight", nn.Parameter(torch.ones(32, 32).char(), False)),
        lambda layer: setattr(layer, "mlp", nn.Identity()),
        lambda layer: setattr(layer, "attention", nn.Identity()),
        lambda layer: setattr(layer, "norm1", nn.RMSNorm(32)),  # no eps of its own
        lambda layer: setattr(layer.attention.v, "forward", lambda x: 2 * x),
        lambda layer: setattr(layer.attention, "qkv", nn.Linear(32, 96)),
        lambda layer: setattr(layer.mlp, "down", type("Lora", (nn.Linear,), {"forward": len})(48, 32, bias=False)),
    ],
)
def test_block_with_another_part_cannot_be_folded(encoder, change):
    layer = encoder.layers[0]
    assert can_fold(layer)
    change(layer)
    assert not can_fold(layer)


def test_other_modules_cannot_be_folded(encoder):
    assert not can_fold(nn.Linear(2, 2))
    assert isinstance(encoder.layers[0], Block)


def test_float8_gated_blocks_without_biases_can_be_folded(tmp_path):
    for number, family in enumerate(FAMILIES):
        encoder = nopad.load(tiny(family, tmp_path / str(number)), precision="fp8")
        assert {can_fold(layer) for layer in encoder.layers} == {family.startswith(("aimv2", "pixtral"))}


def add_bias(linear):
    """Add a bias to a linear layer, float8 or not."""
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.attention, "qkv", type("Lora", (nn.Linear,), {"forward": len})(32, 96, bias=False)),
        lambda layer: setattr(layer.mlp, "gate_up", nn.Linear(32, 96, bias=False)),
        lambda layer: setattr(layer.mlp, "down", nn.Linear(48, 32, bias=False)),
        lambda layer: setattr(layer.attention, "proj", Float8Linear(layer.attention.proj)),
        lambda layer: add_bias(getattr(layer.attention.qkv, "query_key", layer.attention.qkv)),
        lambda layer: add_bias(getattr(layer.attention.qkv, "value", layer.attention.qkv)),
        lambda layer: add_bias(layer.attention.proj),
        lambda layer: add_bias(layer.mlp.gate_up),
        lambda layer: add_bias(layer.mlp.down),
    ],
)
@pytest.mark.parametrize("number", [0, 2])  # the values of the first block are not float8
def test_float8_block_with_another_part_cannot_be_folded(tmp_path, change, number):
    layer = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp8").layers[number]
    assert can_fold(layer)
    change(layer)
    assert not can_fold(layer)


def test_float8_block_with_norms_that_are_not_absorbed_cannot_be_folded(tmp_path):
    biases = {"mlp_bias": False, "proj_bias": False, "query_bias": False, "value_bias": False}
    encoder = nopad.load(tiny("dinov3 gated", tmp_path / "dinov3", **biases), precision="fp8")
    assert encoder.layers[0].mlp.down.bias is None
    assert not can_fold(encoder.layers[0])

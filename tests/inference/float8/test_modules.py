"""Modules with float8 weights."""

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import GRIDS, patches_of, relative, tiny
from torch import nn

import nopad
from nopad.inference.float8.modules import Float8Linear, Float8QKV
from nopad.kernels.gemm_formats import FP8
from nopad.layers.linear import joined


@pytest.mark.parametrize("nonfinite", [float("nan"), float("inf")])
def test_nonfinite_values_stay_in_their_row(nonfinite):
    linear = Float8Linear(nn.Linear(32, 16))
    rows = torch.randn(5, 32)
    expected = linear(rows)
    rows[2, 7] = nonfinite
    output = linear(rows)
    assert output[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(output[others], expected[others])


@torch.no_grad()
@pytest.mark.parametrize("family", ["aimv2", "siglip2"])
def test_layers_return_the_dtype_of_autocast(tmp_path, family):
    layer = nopad.load(tiny(family, tmp_path), precision="fp8").layers[0]
    rows = torch.randn(5, layer.attention.proj.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        assert {part.dtype for part in layer.attention._project(rows)} == {torch.bfloat16}
        assert layer.mlp(rows).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_float8_linear_has_an_error_of_a_few_percent(bias):
    linear = nn.Linear(64, 48, bias=bias)
    rows = torch.randn(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    float8 = Float8Linear(linear)
    # By row: a small row is no worse than a large one.
    expected = F.linear(rows, linear.weight)
    errors = (float8(rows) - linear(rows)).norm(dim=1) / expected.norm(dim=1)
    assert 0.005 < errors.mean() < 0.05
    assert errors.max() < 0.1


@pytest.mark.parametrize("has_bias", [(True, False, True), (False, False, True)])
def test_float8_linear_keeps_joined_biases(has_bias):
    linear = joined([nn.Linear(32, 32, bias=biased) for biased in has_bias])
    expected = linear(torch.zeros(1, 32))
    assert torch.equal(Float8Linear(linear)(torch.zeros(1, 32)), expected)
    for part, biased in zip(expected[0].chunk(3), has_bias, strict=True):
        assert bool(part.any()) == biased


@torch.no_grad()
@pytest.mark.parametrize("cast", ["half", "float", "bfloat16", "double"])
def test_cast_keeps_float8_weights_and_scales(tmp_path, cast):
    encoder = nopad.load(tiny("dinov3", tmp_path / "dinov3"), precision="fp8")
    linear = encoder.layers[-1].attention.qkv
    weight, scale = linear.weight.clone(), linear.scale.clone()
    expected = encoder(patches_of(encoder), GRIDS)
    getattr(encoder, cast)()
    linear = encoder.layers[-1].attention.qkv
    assert (linear.weight.dtype, linear.scale.dtype) == (FP8, torch.float32)
    assert torch.equal(linear.weight.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(linear.scale, scale)
    assert linear.bias.dtype == encoder.dtype == encoder.norm.weight.dtype
    output = encoder(patches_of(encoder), GRIDS)
    assert output.dtype == encoder.dtype
    assert relative(output, expected) < 0.1


@pytest.mark.parametrize("linear", [nn.Linear(32, 96, bias=False), nn.Linear(32, 96)])
@torch.no_grad()
def test_float8_qkv_keeps_the_values_of_the_layer(linear):
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    rows, qkv = torch.randn(5, 32), Float8QKV(linear)
    output, expected, float8 = qkv(rows), linear(rows), Float8Linear(linear)(rows)
    torch.testing.assert_close(output[:, 64:], expected[:, 64:])
    torch.testing.assert_close(output[:, :64], float8[:, :64])
    assert not any(parameter.requires_grad for parameter in qkv.parameters())

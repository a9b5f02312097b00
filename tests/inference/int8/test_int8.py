"""Blocks in int8: rounding, GEMMs, conversion, and blocks of rows on a CPU."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import DISTINCT, FAMILIES, GRIDS, JUNK, is_batch_invariant, patches_of, tiny
from torch import nn

import nopad
from nopad.inference.fusion import blocked_int8
from nopad.inference.fusion.blocked_int8 import SIGNED, UNSIGNED, Int8Weight, onednn_operand
from nopad.inference.int8 import convert, format
from nopad.inference.int8.format import is_exact, multiply_integers, quantize_rows, scaled_mm
from nopad.inference.int8.modules import Int8Linear
from nopad.layers.block import LayerScale

CAPACITY, MAX_SEGMENTS = 160, 9


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return tiny(request.param, tmp_path / "checkpoint")


@pytest.fixture(params=["onednn", "torch"])
def gemm(request, monkeypatch):
    """The GEMM of blocks of rows."""
    operand = onednn_operand()
    if request.param == "onednn" and operand is None:
        pytest.skip("this processor has no exact GEMM of int8 in oneDNN")
    monkeypatch.setattr(blocked_int8, "onednn_operand", lambda: operand if request.param == "onednn" else None)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest_multiple_of_their_scale(dtype):
    values = torch.tensor([[127.0, -3.4, 0.0, 2.6], [-254.0, 3.0, -1.2, 1.0], [0.0, 0.0, 0.0, 0.0]]).to(dtype)
    quantized, scale = quantize_rows(values)
    assert quantized.tolist() == [[127, -3, 0, 3], [-127, 2, -1, 0], [0, 0, 0, 0]]
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (3, 1))
    assert scale[:2, 0].tolist() == [1, 2]
    assert scale[2] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_stay_so(value):
    _, scale = quantize_rows(torch.tensor([[1.0, value], [1.0, 2.0]]))
    assert scale.isfinite().flatten().tolist() == [False, True]
    linear = Int8Linear(nn.Linear(2, 3))
    assert linear(torch.tensor([[1.0, value], [1.0, 2.0]])).isfinite().all(dim=1).tolist() == [False, True]


def test_a_row_does_not_depend_on_its_neighbours():
    values = torch.randn(5, 64)
    quantized, scale = quantize_rows(values)
    alone, alone_scale = quantize_rows(values[3:4])
    assert torch.equal(alone, quantized[3:4])
    assert torch.equal(alone_scale, scale[3:4])


@pytest.mark.parametrize("exact", [True, False])
def test_integers_are_multiplied_exactly(monkeypatch, exact):
    monkeypatch.setattr(format, "is_exact", lambda int_mm: exact and is_exact(int_mm))
    a, b = (torch.randint(-127, 128, (rows, 1040), dtype=torch.int8) for rows in (40, 24))
    a[0], b[0] = 127, -127
    assert torch.equal(multiply_integers(a, b), (a.long() @ b.long().T).float())


def test_a_gemm_that_saturates_is_not_exact():
    def saturating(a, b):
        return (a.double() @ b.double()).clamp(-(2**15), 2**15)

    def missing(a, b):
        raise RuntimeError("not on this processor")

    assert not is_exact(saturating)
    assert not is_exact(missing)
    assert is_exact(lambda a, b: a.long() @ b.long())


@pytest.mark.parametrize("operand", [SIGNED, UNSIGNED])
def test_operands_are_the_same_numbers(operand):
    quantized = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    assert torch.equal(operand(quantized).short() - operand.zero_point, quantized.short())


@pytest.mark.skipif(onednn_operand() is None, reason="this processor has no exact GEMM of int8 in oneDNN")
def test_packed_weights_run_by_an_optimised_gemm():
    """As oneDNN names it: its reference loops take a thousand times as long."""
    script = (
        "import torch; from torch import nn; from nopad.inference.fusion.blocked_int8 import Int8Weight;"
        "from nopad.inference.int8.modules import Int8Linear;"
        "Int8Weight(Int8Linear(nn.Linear(64, 96)), 64)(torch.ones(64, 64, dtype=torch.int8), torch.float32)"
    )
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    executed = [line for line in run.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert executed
    assert "ref" not in executed[-1].split(",")[6], executed[-1]


def test_scaled_products_approximate_the_layer():
    linear, x = nn.Linear(256, 48), torch.randn(64, 256)
    rounded = Int8Linear(linear)
    error = (rounded(x) - linear(x)).norm() / linear(x).norm()
    assert 1e-3 < error < 0.02
    quantized, scale = quantize_rows(x)
    expected = (quantized.double() * scale) @ (rounded.weight.double() * rounded.scale).T
    torch.testing.assert_close(
        scaled_mm(quantized, scale, rounded.weight, rounded.scale, torch.float32).double(), expected
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_packed_weights_equal_the_layer(gemm, bias, scaled):
    linear = Int8Linear(nn.Linear(96, 48, bias=bias))
    layer_scale = LayerScale(48) if scaled else None
    factor = torch.ones(48)
    if layer_scale is not None:
        nn.init.normal_(layer_scale.lambda1)
        factor = layer_scale.lambda1.detach()
    x, other = torch.randn(64, 96), torch.randn(64, 48)
    weight, (quantized, scale) = Int8Weight(linear, 64, layer_scale), quantize_rows(x)
    expected = linear(x) * factor
    torch.testing.assert_close(weight.scaled(weight(quantized, x.dtype), scale), expected)
    torch.testing.assert_close(weight.added(weight(quantized, x.dtype), scale, other), expected + other)


@pytest.mark.parametrize("exact", [True, False])
def test_a_processor_without_int8_is_logged(exact, monkeypatch, caplog):
    monkeypatch.setattr(format, "is_exact", lambda int_mm: exact)
    convert.to_int8(nn.ModuleList())
    assert ("int8 is slower than float32 on this processor" in caplog.text) is not exact


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_close_to_its_own_dtype(folder, dtype):
    plain, encoder = nopad.load(folder), nopad.load(folder, dtype=dtype, precision="int8")
    assert (encoder.precision, plain.precision) == ("int8", None)
    assert not [name for name, module in encoder.layers.named_modules() if isinstance(module, nn.Linear)]
    assert {parameter.dtype for parameter in encoder.parameters()} == {dtype}
    expected = plain.encode(patches_of(plain), GRIDS)
    output = encoder.encode(patches_of(encoder), GRIDS)
    for name in ("tokens", "pooled"):
        cosine = torch.cosine_similarity(getattr(output, name).float(), getattr(expected, name), dim=-1)
        assert 0.995 < cosine.min() < 0.9999999


@torch.no_grad()
@pytest.mark.parametrize("folder", DISTINCT, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_in_blocks_equal_eager_layers(folder, gemm, dtype):
    encoder = nopad.load(folder, dtype=dtype, precision="int8")
    plain = nopad.load(folder, dtype=torch.float32)
    exact = plain.encode(patches_of(plain), GRIDS)
    expected = encoder.encode(patches_of(encoder), GRIDS)
    encoder.compile(512)
    output = encoder.encode(patches_of(encoder), GRIDS)
    assert encoder.execution == f"int8 by {gemm}"
    for name in ("tokens", "pooled"):
        actual, eager, float32 = (getattr(each, name).float() for each in (output, expected, exact))
        # A last bit before rounding may be a step of int8 after it; bfloat16 is rounded twice where rows are scaled.
        factor = 1.2 if dtype == torch.float32 else 1.5
        assert (actual - float32).norm() <= factor * (eager - float32).norm()


@torch.no_grad()
def test_batch_invariance(folder, gemm):
    encoder = nopad.load(folder, precision="int8")
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == f"int8 by {gemm}"
    assert all(is_batch_invariant(encoder, added) for added in JUNK)


@torch.no_grad()
def test_batch_invariance_of_eager_layers(folder):
    encoder = nopad.load(folder, precision="int8")
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    assert encoder.execution == "eager"
    assert all(is_batch_invariant(encoder, added) for added in JUNK)


@torch.no_grad()
def test_changed_norms_are_seen(tmp_path, gemm):
    encoder = nopad.load(tiny("dinov3", tmp_path), precision="int8")
    encoder.compile(512)
    before = encoder(patches_of(encoder), GRIDS)
    encoder.layers[0].norm1.weight.mul_(2)
    encoder.layers[1].layer_scale1.lambda1.mul_(2)
    after = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    eager = encoder(patches_of(encoder), GRIDS)
    assert (after - eager).norm() < 0.1 * (after - before).norm()


@torch.no_grad()
def test_layers_with_hooks_run_as_they_are(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path), precision="int8")
    encoder.compile(512)
    seen = []
    encoder.layers[0].mlp.register_forward_hook(lambda *arguments: seen.append(1))
    encoder(patches_of(encoder), GRIDS)
    assert (encoder.execution, seen) == ("eager", [1])


def test_copies_are_converted_and_compile_again(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path), precision="int8")
    encoder.compile(512)
    with torch.no_grad():
        expected = encoder(patches_of(encoder), GRIDS)
        twin = copy.deepcopy(encoder)
        assert torch.equal(twin(patches_of(twin), GRIDS), expected)
    assert twin.execution == encoder.execution


@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_unsupported_layers_leave_the_encoder_unchanged(tmp_path, change):
    encoder = nopad.load(tiny("aimv2", tmp_path))
    mlp = encoder.layers[1].mlp
    if change == "hook":
        mlp.down.register_forward_hook(lambda *arguments: None)
    else:
        lora = type("Lora", (nn.Linear,), {"forward": lambda self, x: 2 * F.linear(x, self.weight)})
        mlp.set_submodule("down_proj", lora(mlp.down.in_features, mlp.down.out_features))
    message = "got one on layers.1.ffn.down_proj" if change == "hook" else "got Lora; merge it into its weight"
    with pytest.raises(ValueError, match=message):
        encoder.to_precision("int8")
    assert encoder.precision is None
    assert not any(isinstance(module, Int8Linear) for module in encoder.modules())


def test_other_devices_and_formats_are_refused(tmp_path, monkeypatch):
    encoder = nopad.load(tiny("aimv2", tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(type(encoder), "device", torch.device("cuda"))
        with pytest.raises(ValueError, match="precision 'int8': is for a CPU, got cuda; on a GPU, use precision 'fp8'"):
            encoder.to_precision("int8")
    assert encoder.precision is None
    encoder.to_precision("int8")
    with pytest.raises(ValueError, match="the layers are in int8 already, got 'fp8'; load it again"):
        encoder.to_precision("fp8")

"""The float8 format: rounding, scales and GEMM; on a GPU (`-m gpu`) against the references."""

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import relative
from torch import nn

from nopad.inference.float8 import format as fp8
from nopad.inference.float8.format import MIN_AMAX, quantize_rows, round_weight, scaled_mm, silu_mul_quantize
from nopad.inference.float8.modules import Float8Linear
from nopad.kernels.gemm_formats import FP8

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_quantize_rows_scales_to_the_largest_float8_value():
    quantized, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [448.0, 17.0, 0.0]]))
    assert quantized.dtype == FP8
    # 17 lies between 16 and 18, as near to one as to the other: to the even one.
    assert quantized.float().tolist() == [[224.0, -448.0, 112.0], [448.0, 16.0, 0.0]]
    assert torch.equal(scale, torch.tensor([[2.0], [448.0]]) / 448)


def test_quantize_rows_of_zeros():
    quantized, scale = quantize_rows(torch.zeros(1, 4, dtype=torch.bfloat16))
    assert quantized.float().tolist() == [[0.0] * 4]
    assert scale.item() == torch.tensor(MIN_AMAX).div(448).item()


def test_quantize_rows_is_independent_of_other_rows():
    rows = torch.randn(6, 32)
    whole = quantize_rows(rows)
    for number in range(6):
        alone = quantize_rows(rows[number : number + 1])
        among = quantize_rows(torch.cat((1e3 * torch.randn(2, 32), rows[number : number + 1])))
        for a, b, c in zip(whole, alone, among, strict=True):
            assert torch.equal(a[number].view(torch.uint8), b[0].view(torch.uint8))
            assert torch.equal(b[0].view(torch.uint8), c[2].view(torch.uint8))


def test_round_weight_uses_the_scale_with_the_smallest_error():
    weight = torch.randn(64, 256)
    weight[3] = 0.0

    def loss(quantized, scale):
        return (quantized.float() * scale - weight).square().sum(dim=1)

    best, plain = loss(*round_weight(weight)), loss(*quantize_rows(weight))
    assert (best <= plain).all()
    assert best.sum() < 0.85 * plain.sum()
    assert best[3] == 0
    linear = nn.Linear(256, 64, bias=False)
    rounded = Float8Linear(linear)
    assert all(
        map(
            torch.equal,
            (rounded.weight.float(), rounded.scale),
            (weight.float() for weight in round_weight(linear.weight)),
        )
    )


def test_scaled_mm_multiplies_the_scaled_values():
    (a, scale_a), (b, scale_b) = quantize_rows(torch.randn(7, 32)), quantize_rows(torch.randn(5, 32))
    output = scaled_mm(a, scale_a, b, scale_b, torch.float32)
    expected = (a.double() * scale_a) @ (b.double() * scale_b).T
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert scaled_mm(a, scale_a, b, scale_b, torch.bfloat16).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scaled_mm(a, scale_a, b, scale_b, torch.float32), output)


def multiplies_rows_on_a_cpu() -> bool:
    """Whether this torch does: 2.11 has one scale for all rows there."""
    (a, scale_a), (b, scale_b) = quantize_rows(torch.ones(16, 16)), quantize_rows(torch.ones(16, 16))
    try:
        torch._scaled_mm(a, b.T, scale_a, scale_b.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("public", [True, False])
def test_torchs_scaled_mm_equals_the_reference(monkeypatch, public):
    """Both the public function of newer versions and the private one that older versions have."""
    if not multiplies_rows_on_a_cpu():
        pytest.skip("this torch multiplies float8 with a scale for each row on a GPU alone")
    called = []
    if public:
        if not hasattr(F, "scaled_mm"):
            pytest.skip("this torch has no public scaled_mm")
        torch_function = F.scaled_mm
        monkeypatch.setattr(F, "scaled_mm", lambda *args, **kwargs: called.append(1) or torch_function(*args, **kwargs))
    else:
        torch_function = torch._scaled_mm
        monkeypatch.delattr(F, "scaled_mm", raising=False)
        monkeypatch.setattr(
            torch, "_scaled_mm", lambda *args, **kwargs: called.append(1) or torch_function(*args, **kwargs)
        )
    (a, scale_a), (b, scale_b) = quantize_rows(torch.randn(32, 64)), quantize_rows(torch.randn(48, 64))
    output = fp8.torch_scaled_mm(a, scale_a, b, scale_b, torch.bfloat16)
    assert called == [1]
    assert torch.equal(output, scaled_mm(a, scale_a, b, scale_b, torch.bfloat16))


def test_silu_mul_quantize_equals_quantize_rows():
    gate_up = torch.randn(9, 64)
    gate, up = gate_up.chunk(2, dim=1)
    for output, expected in zip(silu_mul_quantize(gate_up), quantize_rows(F.silu(gate) * up), strict=True):
        assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("rows", [1, 300, 1024])
def test_gpu_scaled_mm_equals_the_reference(rows):
    operands = *quantize_rows(torch.randn(rows, 256)), *quantize_rows(torch.randn(96, 256))
    expected = scaled_mm(*operands, torch.float32)
    assert relative(scaled_mm(*(operand.cuda() for operand in operands), torch.bfloat16), expected) < 2e-2


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("width", [48, 128, 2816])
def test_gpu_silu_mul_quantize_equals_the_reference(width):
    gate_up = torch.randn(70, 2 * width).to(torch.bfloat16)
    gate_up[3] = 0
    quantized, scale = silu_mul_quantize(gate_up)
    output, output_scale = silu_mul_quantize(gate_up.cuda())
    assert (output.dtype, output_scale.dtype, output.shape) == (FP8, torch.float32, quantized.shape)
    torch.testing.assert_close(output_scale.cpu(), scale, rtol=1e-5, atol=0)
    assert relative(output.float() * output_scale, quantized.float() * scale) < 2e-2

"""Float8: rounding and scales, what keeps its dtype, and the restrictions of an encoder in float8.

On a GPU (`-m gpu`): its GEMM and its fused rounding against the references, compiled layers against eager ones.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import FAMILIES, GRIDS, WIDE, is_batch_invariant, patches_of, relative, tiny
from torch import nn

import nopad
from nopad.inference.float8 import format as fp8
from nopad.inference.float8.convert import absorb_norms
from nopad.inference.float8.format import FP8, MIN_AMAX, quantize_rows, round_weight, scaled_mm, silu_mul_quantize
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


@pytest.mark.parametrize("public", [True, False])
def test_torchs_scaled_mm_equals_the_reference(monkeypatch, public):
    """Both the public function of newer versions and the private one that older versions have."""
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


def test_silu_mul_quantize_equals_quantize_rows():
    gate_up = torch.randn(9, 64)
    gate, up = gate_up.chunk(2, dim=1)
    for output, expected in zip(silu_mul_quantize(gate_up), quantize_rows(F.silu(gate) * up), strict=True):
        assert torch.equal(output.view(torch.uint8), expected.view(torch.uint8))


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


def test_heads_and_projections_are_not_converted(tmp_path):
    for folder in (tiny("siglip2", tmp_path / "siglip2"), tiny("aimv2 with a head", tmp_path / "aimv2")):
        plain, encoder = nopad.load(folder), nopad.load(folder, precision="fp8")
        for name, parameter in plain.head.named_parameters():
            assert torch.equal(encoder.head.get_parameter(name), parameter)


@torch.no_grad()
@pytest.mark.parametrize("added", [0.0, float("nan"), float("inf")])
def test_batch_invariance(folder, added):
    encoder = nopad.load(folder, precision="fp8")
    encoder.compile(CAPACITY, MAX_SEGMENTS, compiled=False)
    assert is_batch_invariant(encoder, added)


def test_saving_raises(encoder, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="load it without precision to save it"):
        encoder.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="load it without precision to save it"):
        encoder.state_dict()
    with pytest.raises(ValueError, match="load it without precision to save it"):
        nn.ModuleDict({"vision": encoder}).state_dict()
    assert sorted(tmp_path.rglob("*")) == before


def test_training_raises(encoder):
    patches = patches_of(encoder)
    assert not encoder(patches, GRIDS).requires_grad  # also outside no_grad
    with pytest.raises(ValueError, match="has no gradients"):
        encoder(patches.requires_grad_(), GRIDS)
    with torch.no_grad():
        encoder(patches, GRIDS)
    encoder.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="has no gradients"):
        encoder(patches.detach(), GRIDS)
    encoder.requires_grad_(False).train()
    for call in (encoder, encoder.encode):
        with pytest.raises(ValueError, match=r"is for inference, expected eval\(\), got train\(\)"):
            call(patches.detach(), GRIDS)
    assert encoder.eval()(patches.detach(), GRIDS).isfinite().all()


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


@torch.no_grad()
def test_moves_and_copies_keep_the_precision(encoder):
    expected = encoder(patches_of(encoder), GRIDS)
    for twin in (encoder.to("cpu"), encoder.to(device="cpu", dtype=torch.float32), copy.deepcopy(encoder)):
        assert twin.precision == "fp8"
        assert torch.equal(twin(patches_of(twin), GRIDS), expected)
    assert encoder.to("meta").layers[0].mlp.down.weight.dtype == FP8
    assert encoder.precision == "fp8"


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


def test_unknown_precision_raises(tmp_path):
    with pytest.raises(ValueError, match="precision: expected 'fp8', got 'int8'"):
        nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="int8")


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


@pytest.mark.gpu
@NEEDS_GPU
def test_other_dtypes_on_a_gpu_raise(tmp_path):
    folder = tiny("aimv2", tmp_path / "wide", **WIDE)
    with pytest.raises(ValueError, match=r"expected dtype torch\.bfloat16 on a GPU, got torch\.float32"):
        nopad.load(folder, device="cuda", precision="fp8")
    encoder = nopad.load(folder, device="cuda", dtype=torch.bfloat16, precision="fp8").half()
    with pytest.raises(ValueError, match=r"expected dtype torch\.bfloat16 on a GPU, got torch\.float16"):
        encoder(patches_of(encoder), GRIDS)

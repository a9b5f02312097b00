"""On a GPU (`-m gpu`): quack's and torch's GEMM backends against the reference, fused encoders against eager ones."""

import dataclasses
from importlib import util

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import FAMILIES, GRIDS, WIDE, patches_of, relative, tiny
from torch import nn

import nopad
from nopad.inference.compile import MAX_GRAPH_CAPACITY
from nopad.inference.float8.format import quantize_rows
from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import InterleavedRope, subtract_mean
from nopad.inference.fusion.gemm_reference import ReferenceGemm
from nopad.kernels.gemm_formats import FP8
from nopad.segments import Segments

BF16 = torch.bfloat16
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
HAS_QUACK = (
    util.find_spec("quack") is not None
    and torch.cuda.is_available()
    and torch.cuda.get_device_capability()[0] == 9  # the condition is evaluated without a GPU, too
)
NEEDS_QUACK = pytest.mark.skipif(not HAS_QUACK, reason="needs quack on a Hopper GPU: pip install '.[hopper]'")


def backend_named(name):
    if name == "quack":
        from nopad.inference.fusion.gemm_quack import QuackGemm

        return QuackGemm()
    from nopad.inference.fusion.gemm_torch import TorchGemm

    return TorchGemm()


def draw(*shape, dtype=BF16):
    return torch.randn(*shape, device="cuda").to(dtype)


def wide_block(*, gated, biased, activation, size=256, inner=384, heads=4, keeps_mean=False):
    def draw_weight(rows, columns):
        bias = torch.randn(rows, device="cuda") if biased else None
        return GemmWeight(draw(rows, columns) * columns**-0.5, bias)

    up = draw_weight(2 * inner if gated else inner, size)
    weights = draw_weight(3 * size, size), draw_weight(size, size), up, draw_weight(size, inner)
    means = {"zero_mean": biased and not keeps_mean, "subtracts_mean": keeps_mean}
    return FoldedBlock(*weights, activation=activation, gated=gated, eps=1e-5, num_heads=heads, **means)


def run_block(backend, block, tokens, rope):
    """Every result of a block without its attention."""
    block = backend.prepack(block)
    state = backend.start(tokens.clone(), block)
    query, key, value = backend.qkv(state, block, None if rope is None else backend.prepare_rope(rope))
    state = backend.residual_gemm(query.flatten(1), block.proj, state, block)
    up = backend.up(state, block)
    state = backend.residual_gemm(up, block.down, state, block)
    return {"query": query, "key": key, "value": value, "up": up, "tokens": backend.finish(state)}


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param("quack", marks=NEEDS_QUACK), "torch"])
@pytest.mark.parametrize("rows", [256, 1000])
@pytest.mark.parametrize(
    ("kind", "angles"),
    [
        ({"gated": True, "biased": False, "activation": "silu"}, None),
        ({"gated": True, "biased": True, "activation": "silu"}, None),
        ({"gated": False, "biased": True, "activation": "gelu_tanh"}, None),
        ({"gated": False, "biased": True, "activation": "gelu"}, "shared"),
        ({"gated": False, "biased": False, "activation": "gelu"}, "their own"),
        ({"gated": False, "biased": True, "activation": "gelu_tanh", "keeps_mean": True}, "shared"),
    ],
)
def test_gemm_backend_equals_the_reference(name, rows, kind, angles):
    block, tokens, rope = wide_block(**kind), draw(rows, 256), None
    if block.subtracts_mean:
        if name == "quack":
            pytest.skip("quack's epilogues drop the mean")
        qkv, up = (GemmWeight(subtract_mean(each.weight), each.bias) for each in (block.qkv, block.up))  # as folded
        block, tokens = dataclasses.replace(block, qkv=qkv, up=up), tokens + draw(rows, 1)
    if angles is not None:
        cos, sin = (torch.randn(rows, 64, device="cuda") for _ in range(2))
        if angles == "shared":
            cos, sin = (part[:, ::2].repeat_interleave(2, dim=1) for part in (cos, sin))
        rope = InterleavedRope(cos, sin, shared=angles == "shared")
    expected = run_block(ReferenceGemm(), block, tokens, rope)
    for part, output in run_block(backend_named(name), block, tokens, rope).items():
        assert relative(output, expected[part]) < 1e-2, part


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 80])  # by a separate kernel: 80, and two angles of 96, 128
def test_quack_rope_for_all_head_sizes(head_dim, shared):
    block = wide_block(gated=False, biased=True, activation="gelu", size=8 * head_dim, heads=8)
    tokens, angles = draw(1000, 8 * head_dim), torch.randn(2, 1000, head_dim, device="cuda")
    if shared:
        angles = angles[:, :, ::2].repeat_interleave(2, dim=2)
    rope, outputs = InterleavedRope(*angles, shared=shared), {}
    for backend in (ReferenceGemm(), backend_named("quack")):
        state = backend.start(tokens.clone(), block)
        outputs[backend.name] = backend.qkv(state, block, backend.prepare_rope(rope))
    for output, expected in zip(outputs["quack"], outputs["reference"], strict=True):
        assert relative(output, expected) < 4e-3


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize(
    ("rows", "size", "inner"),
    [(256, 256, 384), (1000, 256, 384), (4224, 1024, 2816), (16896, 1024, 2816), (4224, 2048, 5632)],
)
@pytest.mark.parametrize("split_value", [False, True])
def test_quack_float8_equals_the_reference(rows, size, inner, split_value):
    block = wide_block(gated=True, biased=False, activation="silu", size=size, inner=inner)
    if split_value:
        query_key, value = (GemmWeight(part) for part in block.qkv.weight.split(2 * size))
        block = dataclasses.replace(block, qkv=query_key, value=value)
    float8 = {}
    for part in ("qkv", "up", "down"):
        weight, scale = quantize_rows(getattr(block, part).weight)
        float8[part] = GemmWeight(weight, scale=scale[:, 0])
    block, tokens = dataclasses.replace(block, **float8), draw(rows, size)
    expected = run_block(ReferenceGemm(), block, tokens, None)
    outputs = run_block(backend_named("quack"), block, tokens, None)
    assert outputs["up"].dtype == FP8
    for part, output in outputs.items():
        # A value between two float8 neighbours may be rounded to either.
        assert relative(output.float(), expected[part].float()) < 3e-2, part


@pytest.mark.gpu
@NEEDS_QUACK
def test_quack_gelu_equals_the_error_function():
    from nopad.inference.fusion.gemm_quack import QuackGemm, QuackState

    values = torch.linspace(-12, 12, 4096, device="cuda").view(16, 256).to(BF16)
    block = dataclasses.replace(
        wide_block(gated=False, biased=False, activation="gelu", inner=256),
        eps=0.0,
        up=GemmWeight(torch.eye(256, device="cuda", dtype=BF16)),
    )
    sum_sq = torch.full((16, 1), 256.0, device="cuda")  # a root mean square of one
    output = QuackGemm().up(QuackState(values, values, sum_sq, sum_sq), block)
    reference = F.gelu(values.double())
    torch.testing.assert_close(output.double(), reference, rtol=2**-8, atol=1e-3)
    # Over a row, the error is about that of rounding to bfloat16.
    assert relative(output, reference) < 1.1 * relative(reference.to(BF16), reference)


@pytest.mark.gpu
@NEEDS_QUACK
def test_quack_activations_have_separate_kernels_in_an_installed_package(monkeypatch):
    from quack.gemm_runtime import identity

    from nopad.inference.fusion.quack_epilogues import Epilogues

    monkeypatch.setattr(identity, "_is_extern_function", lambda function: True)  # identified by name only
    activations = Epilogues(256, 1e-5, (1, 1)).activations
    assert len({epilogue.semantic_digest for epilogue in activations.values()}) == len(activations) == 3


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
def test_triton_padding_equals_the_reference():
    from nopad.inference import padding
    from nopad.kernels import triton_padding

    tokens, segments = draw(1500, 200), Segments.of([3, 1, 1, 1200, 295], "cuda")
    tokens[3, 7], tokens[4, 1], tokens[1204, 0] = float("nan"), float("inf"), -float("inf")
    out = tokens.new_empty(1520, 200)
    padded, finite = triton_padding.pad_rows(tokens, out)
    expected_finite, masked = padding.mask_nonfinite_rows(tokens)
    assert padded is out
    assert torch.equal(finite, expected_finite)
    assert torch.equal(padded, F.pad(masked, (0, 0, 0, 20)))
    output = padding.poison_segments(padded[:1500], finite, segments)
    assert output.data_ptr() != out.data_ptr()
    poisoned = torch.tensor([False, True, True, True, False], device="cuda")[segments.index()]
    assert torch.equal(output.isnan().all(dim=1), poisoned)
    assert torch.equal(output[~poisoned], tokens[~poisoned])


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("quack", [pytest.param(True, marks=NEEDS_QUACK), False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_encoders_are_as_close_to_float32_as_eager_ones(tmp_path, monkeypatch, family, quack):
    if not quack:
        find_spec = util.find_spec
        monkeypatch.setattr(util, "find_spec", lambda name: None if name == "quack" else find_spec(name))
    encoder = nopad.load(tiny(family, tmp_path / "wide", **WIDE), device="cuda")
    grids = GRIDS.repeat(8, 1)
    patches = patches_of(encoder, grids)
    reference_fp32 = encoder(patches, grids)
    encoder = encoder.to(BF16)
    encoder.set_attention("auto")
    eager_error = relative(encoder(patches.to(BF16), grids), reference_fp32)
    # Without a final norm the mean of rows, which folded LayerNorms drop, would be missing.
    by_quack = quack and (encoder.norm is not None or isinstance(encoder.layers[0].norm1, nn.RMSNorm))
    for capacity in (2048, MAX_GRAPH_CAPACITY + 128):  # with a graph and without
        encoder.compile(capacity)
        assert encoder.execution == ("fused by quack" if by_quack else "fused by torch")
        assert relative(encoder(patches.to(BF16), grids), reference_fp32) <= 1.1 * eager_error
    encoder.compile(2048)
    encoder(patches.to(BF16), grids)
    encoder.layers[1].norm1.weight.mul_(3.0)  # the recorded graph reads it
    output = encoder(patches.to(BF16), grids)
    encoder.uncompile()
    assert relative(output, encoder(patches.to(BF16), grids)) < 2e-2


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_compiled_layers_in_float32_use_the_segments_of_each_pack(tmp_path, attention):
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **WIDE), device="cuda", attention=attention)
    packs = [GRIDS, GRIDS.flip(0), GRIDS[:1]]
    expected = [encoder(patches_of(encoder, grids), grids) for grids in packs]
    encoder.compile(512)
    for grids, tokens in zip(packs, expected, strict=True):
        assert relative(encoder(patches_of(encoder, grids), grids), tokens) < 1e-3


@pytest.mark.gpu
@NEEDS_QUACK
@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "inner"),
    [(16896, 1024, 2816), (4224, 1024, 2816), (4224, 1152, 4304), (1000, 384, 1536), (4224, 2048, 5632)],
)
def test_quack_tiles_of_all_widths_equal_the_reference(rows, size, inner, gated):
    kind = {"gated": gated, "biased": True, "activation": "silu" if gated else "gelu_tanh"}
    block, tokens = wide_block(**kind, size=size, inner=inner, heads=size // 64), draw(rows, size)
    angles = torch.randn(2, rows, 32, device="cuda").repeat_interleave(2, dim=2)
    rope = InterleavedRope(*angles, shared=True) if gated else None
    expected = run_block(ReferenceGemm(), block, tokens, rope)
    for part, output in run_block(backend_named("quack"), block, tokens, rope).items():
        assert relative(output, expected[part]) < 1e-2, part


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_second_gpu_equals_the_first(tmp_path, family):
    folder, outputs = tiny(family, tmp_path / "wide", **WIDE), []
    for device in ("cuda:0", "cuda:1"):  # the current device is the first
        encoder = nopad.load(folder, device=device, dtype=BF16)
        eager = encoder(patches_of(encoder), GRIDS)
        encoder.compile(1024)
        outputs.append((eager.cpu(), encoder(patches_of(encoder), GRIDS).cpu()))
    for first, second in zip(*outputs, strict=True):
        assert relative(second.float(), first.float()) < 1e-2

"""Layers in blocks of rows, as `compile` runs them on a CPU."""

from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import DISTINCT, FAMILIES, GRIDS, patches_of, tiny
from torch import nn

import nopad
from nopad.inference.compile import compiles_by_default
from nopad.inference.fusion import blocked, cpu_linear
from nopad.inference.fusion.blocked import BlockedLayers, PackedBlock, default_block_rows, order_by_length
from nopad.inference.fusion.blocked_qkv import new_qkv, store_qkv
from nopad.inference.fusion.cpu_linear import OneDNNLinear, TorchLinear, linear_class
from nopad.inference.fusion.folding import GemmWeight
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.segments import Segments

CAPACITY = 512
ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
LINEARS = [pytest.param(OneDNNLinear, marks=ONEDNN), TorchLinear]


@pytest.fixture(params=LINEARS)
def linear(request, monkeypatch):
    """The linear layers of all blocks."""
    monkeypatch.setattr(blocked, "linear_class", lambda dtype: request.param)
    return request.param


def skip_unless_available(linear, dtype):
    """In half precision oneDNN needs a processor that has it; torch.compile would run in its place."""
    if linear is OneDNNLinear and dtype != torch.float32 and linear_class(dtype) is not OneDNNLinear:
        pytest.skip("this processor has no bfloat16 for oneDNN")


def compiled(folder, **options):
    encoder = nopad.load(folder, **options)
    encoder.compile(CAPACITY)
    return encoder


@pytest.mark.parametrize("linear_type", LINEARS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh"])
def test_linear_layers_and_their_epilogues(linear_type, bias, activation):
    weight, x, other = torch.randn(48, 32), torch.randn(64, 32), torch.randn(64, 48)
    packed = linear_type(GemmWeight(weight, torch.randn(48) if bias else None), 64)
    expected = F.linear(x, weight, packed.bias)
    torch.testing.assert_close(packed.add(x, other), expected + other)
    torch.testing.assert_close(packed.multiply(x, other), expected * other)
    functions = {
        None: lambda y: y,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    }
    torch.testing.assert_close(packed(x, activation), functions[activation](expected))


@torch.no_grad()
def test_layers_in_blocks_equal_eager_layers(folder, linear):
    encoder = nopad.load(folder)
    expected = encoder.encode(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY)
    output = encoder.encode(patches_of(encoder), GRIDS)
    assert encoder.execution == f"fused by {linear.name}"
    torch.testing.assert_close(output.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.pooled, expected.pooled, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("folder", DISTINCT, indirect=True)
def test_layers_in_blocks_in_half_precision_are_as_close_to_float32_as_eager_layers(folder, linear):
    skip_unless_available(linear, torch.bfloat16)
    exact = nopad.load(folder, dtype=torch.float32)
    expected = exact(patches_of(exact), GRIDS)
    encoder = nopad.load(folder, dtype=torch.bfloat16)
    patches = patches_of(encoder)
    eager = (encoder(patches, GRIDS).float() - expected).norm()
    encoder.compile(CAPACITY)
    assert encoder.execution == f"fused by {linear.name}"
    assert (encoder(patches, GRIDS).float() - expected).norm() <= 1.2 * eager


@torch.no_grad()
@pytest.mark.parametrize("folder", DISTINCT, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_bit_equal_in_any_pack(folder, linear, dtype):
    skip_unless_available(linear, dtype)
    encoder = compiled(folder, dtype=dtype)
    assert encoder.execution == f"fused by {linear.name}"
    order = torch.arange(len(GRIDS)).flip(0)
    lengths = GRIDS.prod(dim=1).tolist()
    patches = patches_of(encoder).split(lengths)
    repeated = [index for index in order.tolist() for _ in range(2)]
    together = encoder.encode(torch.cat([patches[i] for i in repeated]), GRIDS[repeated])
    tokens = together.tokens.split([lengths[i] for i in repeated])
    for place, index in enumerate(repeated):
        alone = encoder.encode(patches[index], GRIDS[index : index + 1])
        assert torch.equal(tokens[place], alone.tokens)
        assert torch.equal(together.pooled[place], alone.pooled[0])


@torch.no_grad()
@pytest.mark.parametrize("folder", DISTINCT, indirect=True)
@pytest.mark.parametrize("rows", [32, 64])
def test_blocks_of_any_size_give_equal_features(folder, monkeypatch, rows):
    encoder = compiled(folder)
    expected = encoder(patches_of(encoder), GRIDS)
    monkeypatch.setattr(blocked, "default_block_rows", lambda linear: rows)
    encoder.compile(CAPACITY)
    assert encoder._runner.stack.block_rows == rows
    torch.testing.assert_close(encoder(patches_of(encoder), GRIDS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packs_are_padded_to_a_short_last_block_where_it_has_equal_bits(tmp_path, monkeypatch):
    encoder = compiled(tiny("siglip2", tmp_path))
    layers = encoder._runner.stack
    assert [layers.padded_rows(n, CAPACITY) for n in (0, 1, 64, 65, 300)] == [64, 64, 64, 128, 320]
    after_attention = PackedBlock.after_attention
    monkeypatch.setattr(  # a GEMM that rounds in another way for another number of rows
        PackedBlock, "after_attention", lambda self, x, y: after_attention(self, x, y) * (1 + len(x) / 2**16)
    )
    monkeypatch.setattr(blocked, "default_block_rows", lambda linear: 256)
    layers = BlockedLayers(encoder.layers)
    assert [layers.padded_rows(n, CAPACITY) for n in (1, 256, 257)] == [256, 256, 512]


@torch.no_grad()
def test_changed_weights_are_packed_again(tmp_path):
    encoder = compiled(tiny("dinov3", tmp_path))
    before = encoder(patches_of(encoder), GRIDS)
    encoder.layers[1].norm1.weight.mul_(2)
    encoder.layers[0].mlp.down.weight.mul_(0.5)
    after = encoder(patches_of(encoder), GRIDS)
    assert encoder.execution != "eager"
    encoder.uncompile()
    torch.testing.assert_close(after, encoder(patches_of(encoder), GRIDS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-3)


def test_an_optimizer_step_is_seen(tmp_path):
    encoder = compiled(tiny("aimv2", tmp_path))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    encoder(patches_of(encoder), GRIDS).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        torch.testing.assert_close(after, encoder(patches_of(encoder), GRIDS), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_run_and_moving_undoes_it(tmp_path):
    encoder = compiled(tiny("siglip2", tmp_path))
    calls = []
    handle = encoder.layers[0].register_forward_hook(lambda *arguments: calls.append(1))
    encoder(patches_of(encoder), GRIDS)
    assert (calls, encoder.execution) == ([1], "eager")
    handle.remove()
    assert encoder.execution == f"fused by {linear_class(torch.float32).name}"
    assert encoder.to(torch.float64).execution == "eager"


@torch.no_grad()
def test_saved_after_compile_is_what_was_loaded(tmp_path):
    folder = tiny("dinov3", tmp_path / "in")
    encoder = compiled(folder)
    encoder(patches_of(encoder), GRIDS)
    encoder.save_pretrained(tmp_path / "out")
    again = nopad.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in nopad.load(folder).state_dict().items())


@torch.no_grad()
def test_nan_stays_in_its_image(folder):
    encoder = compiled(folder)
    patches, length = patches_of(encoder), int(GRIDS[0].prod())
    expected = encoder(patches, GRIDS)
    patches[0, 0] = float("nan")
    output = encoder(patches, GRIDS)
    assert output[:length].isnan().all()
    assert torch.equal(output[length:], expected[length:])


@torch.no_grad()
def test_autocast_changes_no_bits(tmp_path):
    encoder = nopad.load(tiny("siglip2", tmp_path))
    stack = BlockedLayers(encoder.layers)
    tokens, segments = torch.randn(64, encoder.hidden_size), Segments.of([40, 24], "cpu")
    expected = stack(tokens, segments, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stack(tokens, segments, None), expected)


def test_other_dtypes_and_layers_are_left_to_torch(tmp_path):
    encoder = nopad.load(tiny("siglip2", tmp_path))
    reason = blocked.unsupported_reason
    assert "float16" in reason(encoder, torch.device("cpu"), torch.float16)
    assert "on cuda" in reason(encoder, torch.device("cuda"), torch.bfloat16)
    encoder.layers[0].norm1 = nn.Identity()
    assert "only blocks" in reason(encoder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_float8_is_left_to_torch(family, tmp_path):
    """A job does not compile it by itself on a CPU, which would take a compiler."""
    encoder = nopad.load(tiny(family, tmp_path), precision="fp8")
    assert "only blocks" in str(blocked.unsupported_reason(encoder, encoder.device, encoder.dtype))
    assert not compiles_by_default(encoder, 1 << 20)


@pytest.mark.parametrize("lengths", [(5, 3, 5, 3, 5), (2, 2, 2), (1, 2, 3), (3, 0, 3), ()])
def test_segments_of_one_length_come_together(lengths):
    ordered = order_by_length(lengths)
    if ordered is None:
        runs = [length for length, _ in groupby(lengths)]
        assert runs == list(dict.fromkeys(lengths))
        return
    rows = torch.arange(sum(lengths)).split(lengths)
    assert ordered[0] == sorted(lengths)
    assert ordered[1].tolist() == torch.cat(sorted(rows, key=len)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [True, False])
def test_queries_and_keys_are_rotated_on_the_way_to_their_place(dtype, rotated):
    rope = Rope(apply_rotary, torch.randn(5, 1, 4), torch.randn(5, 1, 4)) if rotated else None
    x = torch.randn(5, 72).to(dtype)
    out = new_qkv(torch.empty(9, 24, dtype=dtype), num_heads=3)
    store_qkv(out[2:7], x, rope)
    parts = x.view(5, 3, 3, 8).unbind(1)
    for place, (part, turns) in enumerate(zip(parts, (True, True, False), strict=True)):
        torch.testing.assert_close(out[2:7, place], rope(part) if rope is not None and turns else part)
    assert out[:, 0, 1].is_contiguous()


@ONEDNN
@pytest.mark.parametrize(
    ("has_avx2", "has_avx512", "expected"),
    [(True, True, OneDNNLinear), (True, False, TorchLinear), (False, False, OneDNNLinear)],
)
def test_linear_layers_are_those_that_are_fast_on_a_processor(monkeypatch, has_avx2, has_avx512, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: has_avx2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: has_avx512)
    assert linear_class(torch.float32) is expected
    assert default_block_rows(expected) == (256 if expected is OneDNNLinear else 1024)


def test_linear_layers_without_onednn(monkeypatch):
    assert linear_class(torch.float16) is TorchLinear
    monkeypatch.setattr(cpu_linear.torch.backends.mkldnn, "is_available", lambda: False)
    assert linear_class(torch.float32) is TorchLinear

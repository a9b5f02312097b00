"""Fused layers: results against eager layers, weights that change, and the selection of a GEMM backend."""

import contextlib
import dataclasses
from importlib import util

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, GRIDS, WIDE, is_batch_invariant, patches_of, relative, tiny
from torch import nn
from transformers.activations import ACT2FN

import nopad
from nopad.inference import compile
from nopad.inference.cuda_graphs import CUDAGraphLayers
from nopad.inference.float8.format import FP8, quantize_rows
from nopad.inference.fusion import layers as fused
from nopad.inference.fusion.folding import FoldedBlock, GemmWeight
from nopad.inference.fusion.gemm import FP8_ROW_RMS
from nopad.inference.fusion.gemm_reference import ReferenceGemm, norm_factor, round_to, subtract_mean
from nopad.inference.fusion.layers import (
    FusedLayers,
    gemm_backends_for,
    interleave_rope,
    rope_permutation,
    unsupported_reason,
)
from nopad.inference.ready import EagerLayers
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.layers.rope_3d import apply_rotary_interleaved
from nopad.segments import Segments

CAPACITY, MAX_SEGMENTS = 160, 9
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    return tiny(request.param, tmp_path / "checkpoint")


@pytest.fixture
def encoder(tmp_path):
    return nopad.load(tiny("aimv2", tmp_path / "aimv2"))


@pytest.fixture
def reference_gemm(monkeypatch):
    """Layers are fused with the reference GEMM backend, on a CPU and in any dtype."""
    monkeypatch.setattr(fused, "unsupported_reason", lambda *arguments: None)
    monkeypatch.setattr(fused, "gemm_backends_for", lambda *arguments: ([ReferenceGemm], None))


def tokens_of(encoder, *lengths):
    return torch.randn(sum(lengths), encoder.hidden_size).to(encoder.dtype), Segments.of(lengths, "cpu")


def expected_of(encoder, tokens, segments, rope=None):
    """Output of the eager layers, minus the mean of each row where fused layers drop it."""
    output = EagerLayers(encoder.layers)(tokens, segments, rope).float()
    return subtract_mean(output) if isinstance(encoder.layers[0].norm1, nn.LayerNorm) else output


@torch.no_grad()
def test_fused_layers_equal_eager_layers(folder):
    encoder = nopad.load(folder)
    tokens, segments = tokens_of(encoder, 20, 9, 37)
    rope = encoder.example_rope(len(tokens))
    output = FusedLayers(encoder.layers, ReferenceGemm(), rope)(tokens, segments, rope)
    assert relative(output, expected_of(encoder, tokens, segments, rope)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["aimv2", "dinov3"])
def test_fused_layers_in_half_precision_are_as_close_to_float32_as_eager_layers(tmp_path, family):
    encoder = nopad.load(tiny(family, tmp_path / "wide", **WIDE))
    tokens, segments = tokens_of(encoder, *[64] * 16)
    rope = encoder.example_rope(len(tokens))
    reference_fp32 = expected_of(encoder, tokens, segments, rope)
    layers, tokens = encoder.to(BF16).layers, tokens.to(BF16)
    eager_error = relative(expected_of(encoder, tokens, segments, rope), reference_fp32)
    assert eager_error > 1e-3
    output = FusedLayers(layers, ReferenceGemm(), rope)(tokens, segments, rope)
    assert relative(output, reference_fp32) <= 1.1 * eager_error


@torch.no_grad()
def test_tokens_that_autocast_left_in_float32_are_taken_in_the_layers_dtype(encoder, reference_gemm):
    encoder.to(BF16).compile(CAPACITY, MAX_SEGMENTS)
    expected = encoder(patches_of(encoder), GRIDS)
    encoder.embeddings.register_forward_hook(lambda module, arguments, output: output.float())
    assert torch.equal(encoder(patches_of(encoder), GRIDS), expected)


@torch.no_grad()
def test_fused_layers_in_float8_are_as_close_to_float32_as_eager_layers(tmp_path):
    folder = tiny("aimv2", tmp_path / "wide", **WIDE)
    plain, encoder = nopad.load(folder), nopad.load(folder, precision="fp8")
    tokens, segments = tokens_of(encoder, *[64] * 16)
    reference_fp32 = expected_of(plain, tokens, segments)
    eager_error = relative(expected_of(encoder, tokens, segments), reference_fp32)
    assert eager_error > 1e-2
    output = FusedLayers(encoder.layers, ReferenceGemm())(tokens, segments, None)
    assert relative(output, reference_fp32) <= 1.1 * eager_error


@torch.no_grad()
def test_a_layer_is_four_gemms(encoder):
    seen = []

    class Recording(ReferenceGemm):
        def qkv(self, state, block, rope):
            seen.append(("qkv", state.gemm_input.shape, block.qkv.weight.shape))
            return super().qkv(state, block, rope)

        def up(self, state, block):
            seen.append(("up", state.gemm_input.shape, block.up.weight.shape))
            return super().up(state, block)

        def residual_gemm(self, x, weight, state, block):
            seen.append(("residual", x.shape, weight.weight.shape))
            return super().residual_gemm(x, weight, state, block)

    FusedLayers(encoder.layers, Recording())(*tokens_of(encoder, 5, 4), None)
    layer = [
        ("qkv", (9, 32), (96, 32)),
        ("residual", (9, 32), (32, 32)),
        ("up", (9, 32), (96, 32)),
        ("residual", (9, 48), (32, 48)),
    ]
    assert seen == 3 * layer


def block_of(**weights):
    """A block of one head with these weights."""
    empty = GemmWeight(torch.empty(0, 0))
    weights = {"qkv": empty, "proj": empty, "up": empty, "down": empty, **weights}
    return FoldedBlock(**weights, activation="silu", gated=True, eps=0.0, num_heads=1, zero_mean=False)


@torch.no_grad()
def test_reference_gemm_by_hand():
    gemm, tokens = ReferenceGemm(), torch.tensor([[1.0, 7.0]])  # a root mean square of 5
    weight = torch.tensor([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]])
    block = block_of(qkv=GemmWeight(weight, torch.tensor([0.0, 1.0, 0.0])), up=GemmWeight(weight[:2]))
    state = gemm.start(tokens, block)
    torch.testing.assert_close(norm_factor(state, block), torch.tensor([[0.2]]))
    qkv = torch.cat(gemm.qkv(state, block, None))
    torch.testing.assert_close(qkv, torch.tensor([0.4, 5.2, 1.0]).view(3, 1, 1))
    torch.testing.assert_close(gemm.up(state, block), F.silu(torch.tensor([[0.4]])) * 4.2)
    state = gemm.residual_gemm(tokens, GemmWeight(weight[:2], torch.tensor([1.0, 0.0])), state, block)
    assert gemm.finish(state).tolist() == [[4.0, 28.0]]
    torch.testing.assert_close(norm_factor(state, block), torch.tensor([[400.0]]).rsqrt())


def test_permute_gate_up_moves_pairs_together():
    rows = torch.arange(12.0)  # gate 0, up 0, gate 1, …
    block = block_of(up=GemmWeight(rows[:, None], bias=10 * rows, scale=100 * rows)).permute_gate_up([2, 0, 1])
    expected = torch.tensor([4.0, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9])
    assert torch.equal(block.up.weight[:, 0], expected)
    assert torch.equal(block.up.bias, 10 * expected)
    assert torch.equal(block.up.scale, 100 * expected)


class Swapped(ReferenceGemm):
    """Swaps gates and ups."""

    name = "swapped"

    def prepack(self, block):
        return dataclasses.replace(block, up=block.up[torch.arange(len(block.up.weight)).view(-1, 2).flip(1).flatten()])


class Undefined(ReferenceGemm):
    """Returns NaN."""

    name = "undefined"

    def finish(self, state):
        return state.tokens * float("nan")


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("wrong", [Swapped, Undefined])
def test_wrong_fused_layers_are_not_used(tmp_path, monkeypatch, caplog, precision, wrong):
    encoder = nopad.load(tiny("aimv2", tmp_path / "wide", **WIDE), precision=precision)

    def candidates(encoder):
        yield from (lambda gemm=gemm: FusedLayers(encoder.layers, gemm()) for gemm in (wrong, ReferenceGemm))

    monkeypatch.setattr(compile, "_candidates", candidates)
    encoder.compile(512)
    assert encoder.execution == "fused by reference"
    (message,) = caplog.messages
    assert f"layers fused by {wrong.name} differ from the eager layers" in message


@torch.no_grad()
def test_check_accepts_right_layers(folder, monkeypatch):
    monkeypatch.setattr(fused, "MAX_REL_ERROR", 1e-3)
    encoder = nopad.load(folder)
    rope = encoder.example_rope(30)
    tokens, segments = tokens_of(encoder, 17, 13)
    FusedLayers(encoder.layers, ReferenceGemm(), rope).check(tokens, segments, rope)


@torch.no_grad()
def test_check_is_skipped_for_nonfinite_layers(encoder, reference_gemm):
    encoder.layers[0].attention.proj.weight[0, 0] = float("inf")
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "fused by reference"


@torch.no_grad()
def test_float8_rows_may_grow_eighty_times_in_one_step(tmp_path):
    weight, scale = quantize_rows(torch.randn(4, 16))
    gemm, block = ReferenceGemm(), block_of(down=GemmWeight(weight, scale=scale[:, 0]))
    tokens = torch.randn(3, 16)
    tokens[0] = 0.0
    tokens[0, 3] = 1.0  # a row with a single value
    state = gemm.residual_gemm(80 * tokens, GemmWeight(torch.eye(16)), gemm.start(tokens, block), block)
    normed = state.gemm_input.float() * norm_factor(state, block)
    torch.testing.assert_close(normed, F.rms_norm(state.tokens, (16,)), rtol=0.07, atol=0.02)
    state = gemm.residual_gemm(1e5 * tokens, GemmWeight(torch.eye(16)), gemm.start(tokens, block), block)
    assert state.gemm_input.float().abs().max() == 448


def test_rounding_to_float8_saturates():
    values = torch.tensor([1e6, -500.0, 3.0])
    assert round_to(values, FP8).float().tolist() == [448, -448, 3]
    assert round_to(values, BF16).float()[1] == -500


@torch.no_grad()
def test_float8_rows_are_scaled_by_the_rms_before_the_residual_sum():
    weight, scale = quantize_rows(torch.randn(4, 16))
    block = block_of(down=GemmWeight(weight, scale=scale[:, 0]))
    gemm, tokens = ReferenceGemm(), torch.randn(3, 16)
    first = gemm.start(tokens, block)
    update = 5 * torch.randn(3, 16)
    second = gemm.residual_gemm(update, GemmWeight(torch.eye(16)), first, block)
    torch.testing.assert_close(second.tokens, tokens + update)
    third = gemm.residual_gemm(7 * torch.randn(3, 16), GemmWeight(torch.eye(16)), second, block)
    # The first rows are scaled by their own rms, all others by that of the rows before them.
    for state, scaled_by in ((first, first), (second, first), (third, second)):
        rms = scaled_by.tokens.square().mean(dim=1, keepdim=True).sqrt()
        assert state.gemm_input.dtype == FP8
        expected = state.tokens * (FP8_ROW_RMS / rms)
        torch.testing.assert_close(state.gemm_input.float(), expected, rtol=0.07, atol=0.002)
        # The factor takes that scale into account: the result has an rms of one.
        normed = F.rms_norm(state.tokens, (16,))
        output = state.gemm_input.float() * norm_factor(state, block)
        torch.testing.assert_close(output, normed, rtol=0.07, atol=0.02)
        # A weight that is not float8 reads the tokens, a float8 weight the float8 rows.
        plain = state.for_weight(GemmWeight(torch.eye(16)))
        assert plain.gemm_input is state.tokens
        torch.testing.assert_close(plain.gemm_input * norm_factor(plain, block), normed)
        assert state.for_weight(block.down) is state


@torch.no_grad()
def test_value_weight_that_is_not_float8_reads_the_tokens():
    weight, scale = quantize_rows(torch.eye(16).repeat(3, 1))
    up = GemmWeight(weight, scale=scale[:, 0])
    query_key, down = (GemmWeight(weight[:rows], scale=scale[:rows, 0]) for rows in (32, 16))
    block = block_of(qkv=query_key, value=GemmWeight(torch.eye(16)), up=up, down=down)
    gemm, tokens = ReferenceGemm(), torch.randn(3, 16)
    state, normed = gemm.start(tokens, block), F.rms_norm(tokens, (16,))
    query, key, value = (part.flatten(1) for part in gemm.qkv(state, block, None))
    torch.testing.assert_close(value, normed, rtol=1e-4, atol=1e-5)
    assert torch.equal(query, key)
    assert 1e-3 < relative(query, normed) < 5e-2
    assert gemm.up(state, block).dtype == block.up.weight.dtype == FP8


@torch.no_grad()
def test_changed_float8_weights_are_folded_again(tmp_path):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision="fp8")
    layers, (tokens, segments) = FusedLayers(encoder.layers, ReferenceGemm()), tokens_of(encoder, 9, 4)
    before = layers(tokens, segments, None)
    encoder.layers[0].mlp.gate_up.scale.mul_(3)
    assert layers.refresh()
    after = layers(tokens, segments, None)
    assert relative(after, before) > 0.1
    assert relative(after, FusedLayers(encoder.layers, ReferenceGemm())(tokens, segments, None)) == 0


@torch.no_grad()
@pytest.mark.parametrize("apply", [apply_rotary, apply_rotary_interleaved])
def test_interleaved_rope_equals_rope_in_permuted_channels(apply):
    query, size = torch.randn(5, 2, 8), 8 if apply is apply_rotary_interleaved else 4
    rope = Rope(apply, torch.randn(5, 1, size), torch.randn(5, 1, size))
    permutation = rope_permutation(rope, 8)
    permutation = torch.arange(8) if permutation is None else permutation
    interleaved = interleave_rope(rope)
    cos, sin = interleaved.cos[:, None], interleaved.sin[:, None]
    output = apply_rotary_interleaved(query[:, :, permutation], cos, sin)
    torch.testing.assert_close(output, rope(query)[..., permutation])
    assert interleaved.shared == (apply is apply_rotary)


def test_strict_positions_are_warmed_up_on_their_grid(tmp_path, reference_gemm, monkeypatch):
    encoder = nopad.load(tiny("siglip", tmp_path / "siglip"), positions="strict")
    layouts, table = [], encoder.embeddings.position_embedding
    table.register_forward_pre_hook(lambda _, arguments: layouts.append(arguments[0]))
    encoder.compile(CAPACITY, MAX_SEGMENTS)  # strict positions raise on another grid
    assert encoder.execution == "fused by reference"
    assert {layout.grid for layout in layouts} == {((1, *table.grid),)}


def test_unsupported_reasons(folder, monkeypatch):
    encoder = nopad.load(folder)
    assert unsupported_reason(encoder, CUDA, BF16) is None
    reason = unsupported_reason(encoder, torch.device("cpu"), BF16)
    assert reason == "fused layers are for bfloat16 or float16 on a GPU, not for torch.bfloat16 on cpu"
    assert "not for torch.float32 on cuda" in unsupported_reason(encoder, CUDA, torch.float32)
    encoder.layers[1].norm1.eps = encoder.layers[1].norm2.eps = 0.5
    assert "equal norms" in unsupported_reason(encoder, CUDA, BF16)
    encoder.layers[1].norm1.eps = 0.25
    assert "only blocks" in unsupported_reason(encoder, CUDA, BF16)


def test_compile_in_inference_mode_makes_writable_tensors(encoder, reference_gemm):
    with torch.inference_mode():
        encoder.compile(CAPACITY, MAX_SEGMENTS)
    with torch.no_grad():
        encoder.layers[0].norm1.weight.mul_(2.0)
        output = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_layers_without_a_final_layer_norm_are_not_fused(tmp_path):
    encoder = nopad.load(tiny("onevision", tmp_path / "headless", use_head=False))
    assert encoder.norm is None
    assert "which only a LayerNorm after the layers would ignore" in unsupported_reason(encoder, CUDA, BF16)


@pytest.mark.parametrize(
    ("capability", "triton", "quack", "precision", "backends", "reason"),
    [
        ((9, 0), True, True, None, ["_quack_gemm", "_torch_gemm"], None),
        ((9, 0), True, True, "fp8", ["_quack_gemm"], None),
        ((9, 0), True, False, None, ["_torch_gemm"], "quack is not installed: pip install 'nopad[hopper]'"),
        ((9, 0), True, False, "fp8", [], "quack is not installed: pip install 'nopad[hopper]'"),
        ((9, 0), False, True, None, [], "Triton is not installed or does not work"),
        (
            (8, 0),
            True,
            True,
            None,
            ["_torch_gemm"],
            "quack's GEMMs are for bfloat16 on a Hopper GPU, not for torch.bfloat16 on cuda",
        ),
    ],
)
def test_gemm_backends_for(encoder, monkeypatch, capability, triton, quack, precision, backends, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fused, "triton_works", lambda: triton)
    monkeypatch.setattr(util, "find_spec", lambda name: name if quack else None)
    if precision is not None:
        encoder.to_precision(precision)
    available, reason_for_fewer = gemm_backends_for(encoder, CUDA, BF16)
    assert [make.__name__ for make in available] == backends
    assert reason_for_fewer == reason


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, TypeError, ImportError, KeyError])
def test_next_backend_is_used_where_the_fastest_fails(encoder, reference_gemm, monkeypatch, caplog, error):
    def broken():
        raise error("of another version")

    monkeypatch.setattr(fused, "gemm_backends_for", lambda *arguments: ([broken, ReferenceGemm], None))
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "fused by reference"
    assert "the layers are not compiled in the fastest way" in caplog.text
    assert "of another version" in caplog.text


@torch.no_grad()
def test_changed_weights_are_folded_once_into_the_same_tensors(encoder, monkeypatch):
    layers = FusedLayers(encoder.layers, ReferenceGemm())
    addresses = [weight.weight.data_ptr() for block in layers.blocks for weight in block.weights]
    of, folded = FoldedBlock.of, []
    monkeypatch.setattr(FoldedBlock, "of", lambda layer, permutation: folded.append(layer) or of(layer, permutation))
    layers.refresh()
    assert folded == []
    encoder.layers[1].norm1.weight.mul_(3.0)
    encoder.layers[2].mlp.down.weight.mul_(-1.0)
    for _ in range(3):
        layers.refresh()
    assert folded == list(encoder.layers)
    assert [weight.weight.data_ptr() for block in layers.blocks for weight in block.weights] == addresses
    tokens, segments = tokens_of(encoder, 20, 1)
    assert relative(layers(tokens, segments, None), expected_of(encoder, tokens, segments)) < 1e-5


@torch.no_grad()
def test_static_packs_run_fused_layers(folder, reference_gemm):
    encoder = nopad.load(folder)
    expected = encoder.encode(patches_of(encoder), GRIDS)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "fused by reference"
    output = encoder.encode(patches_of(encoder), GRIDS)
    assert relative(output.tokens, expected.tokens) < 1e-5
    assert not torch.equal(output.tokens, expected.tokens)
    assert relative(output.pooled, expected.pooled) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("added", [0.0, float("nan"), float("inf")])
def test_batch_invariance(tmp_path, reference_gemm, precision, added):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision=precision)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert is_batch_invariant(encoder, added)


@torch.no_grad()
def test_changed_weights_reach_recorded_graphs(encoder, reference_gemm, monkeypatch):
    monkeypatch.setattr(CUDAGraphLayers, "__call__", lambda self, *arguments: self.layers(*arguments))
    monkeypatch.setattr(CUDAGraphLayers, "exclusive", lambda self: contextlib.nullcontext())
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    encoder._runner.layers = CUDAGraphLayers(encoder._runner.layers)
    assert not encoder._runner.layers.fixed_memory  # weights are folded again into the same memory
    assert CUDAGraphLayers(EagerLayers(encoder.layers)).fixed_memory
    assert encoder.execution == "fused by reference"
    encoder.layers[0].norm2.weight.mul_(2.0)
    output = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_training_without_new_versions_is_detected(encoder, reference_gemm):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1, fused=True)
    encoder(patches_of(encoder), GRIDS).sum().backward()
    optimizer.step()
    with torch.no_grad():
        output = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.mlp, "down", nn.Linear(48, 32)),
        lambda layer: setattr(layer.mlp.down, "bias", nn.Parameter(torch.ones(32))),
        lambda layer: setattr(layer.mlp, "activation", ACT2FN["gelu"]),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm(32)),
    ],
)
def test_replaced_parts_are_detected(encoder, reference_gemm, change):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    change(encoder.layers[1])
    output = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: setattr(encoder, "layers", encoder.layers[:1]),
        lambda encoder: setattr(encoder.layers[1].mlp, "forward", torch.zeros_like),
    ],
)
def test_replaced_layers_and_forwards_are_detected(encoder, reference_gemm, change):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    change(encoder)
    output = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
def test_dropout_in_training_runs_eagerly(tmp_path, reference_gemm):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2", attention_dropout=0.5))
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    patches = patches_of(encoder)
    assert torch.equal(encoder(patches, GRIDS), encoder(patches, GRIDS))
    encoder.train()
    assert not torch.equal(encoder(patches, GRIDS), encoder(patches, GRIDS))


@torch.no_grad()
def test_global_hooks_are_called(encoder, reference_gemm):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        encoder(patches_of(encoder), GRIDS)
    finally:
        hook.remove()
    assert encoder.layers[1].mlp in seen


@torch.no_grad()
def test_weights_made_in_inference_mode(tmp_path, reference_gemm):
    with torch.inference_mode():
        encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"))
        encoder.to(torch.bfloat16)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "fused by reference"
    assert encoder(patches_of(encoder), GRIDS).isfinite().all()


@torch.no_grad()
def test_replaced_layer_is_detected(encoder, reference_gemm):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    encoder.layers[0] = encoder.layers[2]
    output = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
def test_compile_calls_no_hooks(encoder, reference_gemm):
    seen = []
    encoder.layers[0].mlp.register_forward_hook(lambda *arguments: seen.append(arguments))
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert not seen


@torch.no_grad()
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_in_layers_are_called(encoder, reference_gemm, register):
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    seen = []
    hook = getattr(encoder.layers[1].mlp, register)(lambda module, arguments, *output: seen.append(arguments[0]))
    encoder(patches_of(encoder), GRIDS)
    assert [len(tokens) for tokens in seen] == [CAPACITY]
    hook.remove()
    encoder(patches_of(encoder), GRIDS)
    assert len(seen) == 1


@torch.no_grad()
def test_parts_that_cannot_be_folded_run_eagerly(encoder, reference_gemm):
    encoder.compile(CAPACITY, MAX_SEGMENTS)

    class Doubled(nn.Module):
        """Like a LoRA layer: not an `nn.Linear`, but with a `weight`."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight, self.bias = linear, linear.weight, None
            self.factor = nn.Parameter(torch.tensor(2.0))

        def forward(self, input):
            return self.factor * self.linear(input)

    encoder.layers[1].mlp.down = Doubled(encoder.layers[1].mlp.down)
    output = encoder(patches_of(encoder), GRIDS)
    encoder.uncompile()
    assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


def test_folding_changes_neither_saved_weights_nor_gradients(encoder, reference_gemm, tmp_path):
    encoder.save_pretrained(tmp_path / "before")
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    with torch.no_grad():
        encoder(patches_of(encoder), GRIDS)
    encoder.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    encoder(patches_of(encoder), GRIDS).sum().backward()
    assert encoder.layers[0].norm1.weight.grad.abs().sum() > 0

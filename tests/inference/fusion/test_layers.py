"""Fused layers: results against eager layers, the check before use, and the selection of a GEMM backend."""

import dataclasses
from importlib import util

import pytest
import torch
from tiny_encoders import GRIDS, JUNK, WIDE, is_batch_invariant, patches_of, relative, segments_of, tiny
from torch import nn

import nopad
from nopad.inference import compile
from nopad.inference.fusion import layers as fused
from nopad.inference.fusion.gemm import subtract_mean
from nopad.inference.fusion.gemm_reference import ReferenceGemm
from nopad.inference.fusion.layers import (
    FusedLayers,
    gemm_backends_for,
    interleave_rope,
    rope_permutation,
    unsupported_reason,
)
from nopad.inference.layer_stack import EagerLayers
from nopad.layers.attention import Rope
from nopad.layers.rope import apply_rotary
from nopad.layers.rope_3d import apply_rotary_interleaved

CAPACITY, MAX_SEGMENTS = 160, 9
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def tokens_of(encoder, *lengths):
    return torch.randn(sum(lengths), encoder.hidden_size).to(encoder.dtype), segments_of(encoder, *lengths)


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
        for gemm in (wrong, ReferenceGemm):
            yield lambda gemm=gemm: FusedLayers(encoder.layers, gemm()), compile.UNAVAILABLE_ERRORS

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


@torch.no_grad()
def test_layers_without_a_final_layer_norm_keep_the_mean_of_rows(tmp_path, reference_gemm):
    encoder = nopad.load(tiny("onevision", tmp_path / "headless", use_head=False))
    assert encoder.norm is None
    expected = encoder(patches_of(encoder), GRIDS)
    assert float(expected.mean(dim=1).abs().min()) > 0.1
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert encoder.execution == "fused by reference"
    assert relative(encoder(patches_of(encoder), GRIDS), expected) < 1e-5


def test_quack_takes_layers_with_a_final_layer_norm_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "triton_works", lambda: True)
    monkeypatch.setattr(fused.util, "find_spec", lambda name: name)
    for name, use_head in (("headless", False), ("whole", True)):
        encoder = nopad.load(tiny("onevision", tmp_path / name, use_head=use_head))
        backends, reason = fused.gemm_backends_for(encoder, CUDA, BF16)
        assert (fused._quack_gemm in backends) == use_head
        assert fused._torch_gemm in backends
        assert (reason is None) == use_head


def test_quack_takes_no_rotary_embedding_in_float8(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused, "triton_works", lambda: True)
    monkeypatch.setattr(fused.util, "find_spec", lambda name: name)
    encoder = nopad.load(tiny("pixtral", tmp_path / "checkpoint"))
    assert fused._quack_gemm in fused.gemm_backends_for(encoder, CUDA, BF16)[0]
    encoder.to_precision("fp8")
    backends, reason = fused.gemm_backends_for(encoder, CUDA, BF16)
    assert backends == []
    assert reason == "quack's epilogues apply rotary embedding in bfloat16, not in float8"


NO_QUACK = "quack is not installed: pip install '.[hopper]' in a clone of nopad"


@pytest.mark.parametrize(
    ("capability", "triton", "quack", "precision", "backends", "reason"),
    [
        ((9, 0), True, True, None, ["_quack_gemm", "_torch_gemm"], None),
        ((9, 0), True, True, "fp8", ["_quack_gemm"], None),
        ((9, 0), True, False, None, ["_torch_gemm"], NO_QUACK),
        ((9, 0), True, False, "fp8", [], NO_QUACK),
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
def test_batch_invariance(tmp_path, reference_gemm, precision):
    encoder = nopad.load(tiny("aimv2", tmp_path / "aimv2"), precision=precision)
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    assert all(is_batch_invariant(encoder, added) for added in JUNK)

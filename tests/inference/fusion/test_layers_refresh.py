"""Fused layers whose weights, modules or hooks change: weights are folded again, other changes run eagerly."""

import contextlib

import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import GRIDS, patches_of, relative, tiny
from torch import nn
from transformers.activations import ACT2FN

import nopad
from nopad.inference.cuda_graphs import CUDAGraphLayers
from nopad.inference.fusion.folding import FoldedBlock
from nopad.inference.fusion.gemm import subtract_mean
from nopad.inference.fusion.gemm_reference import ReferenceGemm
from nopad.inference.fusion.layers import (
    FusedLayers,
)
from nopad.inference.layer_stack import EagerLayers
from nopad.segments import Segments

CAPACITY, MAX_SEGMENTS = 160, 9
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def tokens_of(encoder, *lengths):
    return torch.randn(sum(lengths), encoder.hidden_size).to(encoder.dtype), Segments.of(lengths, "cpu")


def expected_of(encoder, tokens, segments, rope=None):
    """Output of the eager layers, minus the mean of each row where fused layers drop it."""
    output = EagerLayers(encoder.layers)(tokens, segments, rope).float()
    return subtract_mean(output) if isinstance(encoder.layers[0].norm1, nn.LayerNorm) else output


@torch.no_grad()
@pytest.mark.parametrize("replace", ["data", "assign"])
def test_weights_that_are_replaced_are_read_and_the_old_ones_kept(encoder, replace):
    """Where nothing is folded into a weight, fused layers read the parameter's own memory, which is not theirs."""
    layers, (tokens, segments) = FusedLayers(encoder.layers, ReferenceGemm()), tokens_of(encoder, 9, 4)
    old = [layer.attention.proj.weight.detach() for layer in encoder.layers]
    values, generation = [weight.clone() for weight in old], layers.generation
    new = [torch.randn_like(weight) / 9 for weight in old]
    for layer, weight in zip(encoder.layers, new, strict=True):
        if replace == "data":
            layer.attention.proj.weight.data = weight
        else:
            layer.attention.proj.load_state_dict({"weight": weight}, strict=False, assign=True)
    assert layers.refresh()
    torch.testing.assert_close(layers(tokens.clone(), segments, None), expected_of(encoder, tokens, segments))
    assert all(torch.equal(weight, before) for weight, before in zip(old, values, strict=True))
    assert layers.generation == generation + 1
    assert layers.refresh()
    assert layers.generation == generation + 1


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


def test_compile_in_inference_mode_makes_writable_tensors(encoder, reference_gemm):
    with torch.inference_mode():
        encoder.compile(CAPACITY, MAX_SEGMENTS)
    with torch.no_grad():
        encoder.layers[0].norm1.weight.mul_(2.0)
        output = encoder(patches_of(encoder), GRIDS)
        encoder.uncompile()
        assert relative(output, encoder(patches_of(encoder), GRIDS)) < 1e-5


@torch.no_grad()
def test_changed_weights_are_folded_once_into_the_same_tensors(encoder, monkeypatch):
    layers = FusedLayers(encoder.layers, ReferenceGemm())
    addresses = [weight.weight.data_ptr() for block in layers.blocks for weight in block.weights]
    of, folded = FoldedBlock.of, []
    monkeypatch.setattr(
        FoldedBlock, "of", lambda layer, *args, **more: folded.append(layer) or of(layer, *args, **more)
    )
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
def test_changed_weights_reach_recorded_graphs(encoder, reference_gemm, monkeypatch):
    monkeypatch.setattr(CUDAGraphLayers, "__call__", lambda self, *arguments: self.layers(*arguments))
    monkeypatch.setattr(CUDAGraphLayers, "exclusive", lambda self: contextlib.nullcontext())
    encoder.compile(CAPACITY, MAX_SEGMENTS)
    encoder._runner.stack = CUDAGraphLayers(encoder._runner.stack)
    assert not encoder._runner.stack.fixed_memory  # weights are folded again into the same memory
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

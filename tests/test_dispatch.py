"""Encoders that accelerate spreads over devices, or whose weights it fetches for each call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_encoders import FAMILIES, GRIDS, patches_of, relative, tiny
from torch import nn

import nopad

hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is a development dependency")
every_family = pytest.mark.parametrize("family", FAMILIES)
gpu = pytest.mark.gpu


@pytest.fixture
def encoder(family, tmp_path):
    return nopad.load(tiny(family, tmp_path / "checkpoint"))


@pytest.fixture
def offloaded(encoder, tmp_path):
    """The same with all weights on disk."""
    return type(encoder).from_pretrained(encoder.source, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def features(encoder, pack):
    """All that an encoder returns for a pack."""
    with torch.no_grad():
        output = encoder.encode(pack, output_hidden_states=True)
    return [output.tokens, output.pooled, *output.hidden_states]


def pack_of(encoder):
    frames = encoder.temporal_patch_size
    return nopad.Pack(patches_of(encoder), GRIDS, encoder.patch_size, encoder.patch_order, temporal_patch_size=frames)


def run_on(module, device):
    """Let a module have its weights and inputs on a device, as `device_map` does."""
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(device, place_submodules=True))


@every_family
def test_patches_go_where_the_embeddings_run(encoder, offloaded):
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    assert offloaded.device == torch.device("cpu")
    images = [np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)] * 2
    pack = offloaded.pack(images, size="native")
    assert torch.equal(pack.hidden_states, encoder.pack(images, size="native").hidden_states)
    for result, expected in zip(features(offloaded, pack), features(encoder, pack), strict=True):
        assert relative(result, expected) < 1e-6
    assert relative(offloaded.embed(images, size="native"), encoder.embed(images, size="native")) < 1e-6


@pytest.mark.parametrize("family", ["dinov3"])
def test_patches_elsewhere_are_refused(encoder):
    with pytest.raises(ValueError, match="hidden_states: expected on cpu like the patch embedding, got meta"):
        encoder(patches_of(encoder).to("meta"), GRIDS)


def parts_of(encoder):
    """Names of the parts that a `device_map` may put on different devices."""
    layers = encoder.layers
    children = [name for name, child in encoder.named_children() if layers not in (child, *child.children())]
    buffers = [name for name, _ in encoder.named_buffers(recurse=False)]
    return [*buffers, *children, *(f"layers.{number}" for number in range(len(encoder.layers)))]


@every_family
def test_every_other_part_on_disk(encoder, tmp_path):
    device_map = {name: ("disk", "cpu")[number % 2] for number, name in enumerate(parts_of(encoder))}
    mixed = type(encoder).from_pretrained(encoder.source, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in mixed.parameters()} == {"cpu", "meta"}
    for result, expected in zip(features(mixed, pack_of(mixed)), features(encoder, pack_of(encoder)), strict=True):
        assert relative(result, expected) < 1e-6


@every_family
def test_offloaded_layers_run_uncompiled_on_filled_packs(offloaded, caplog):
    pack = pack_of(offloaded)
    before = features(offloaded, pack)[0]
    offloaded.compile(128, 16)
    assert "accelerate moves" in caplog.text
    assert (offloaded.compiled_capacity, offloaded.execution) == (128, "eager")
    assert relative(features(offloaded, pack)[0], before) < 1e-6


class Seeing(nn.Module):
    """Notes where a layer gets its arguments, and is a layer that adds nothing."""

    def forward(self, tokens, segments, rope=None):
        """`(T, D)` to `(T, D)`, on the CPU."""
        self.devices = {tensor.device.type for tensor in (tokens, segments.cu_seqlens)}
        if rope is not None:
            self.devices |= {rope.cos.device.type, rope.sin.device.type}
        return torch.zeros(tokens.shape)


@every_family
def test_segments_and_rope_go_where_the_layer_is(encoder):
    seeing = Seeing()
    encoder.layers.append(seeing)
    run_on(seeing, "meta")
    features(encoder, pack_of(encoder))
    assert seeing.devices == {"meta"}


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@every_family
def test_parts_on_gpu_and_cpu_in_turn(encoder):
    pack = pack_of(encoder)
    expected = features(encoder, pack)
    buffers = dict(encoder.named_buffers(recurse=False))  # `device_map` may name them, hooks are for modules
    for number, name in enumerate(name for name in parts_of(encoder) if name not in buffers):
        run_on(encoder.get_submodule(name), "cpu" if number % 2 else "cuda:0")
    for result, each in zip(features(encoder, pack.to("cuda")), expected, strict=True):
        assert relative(result, each) < 1e-4  # on whichever device the last part of each family is


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_map_over_two_gpus(encoder, family, dtype):
    encoder = nopad.load(encoder.source, dtype=dtype, device="cuda:0")
    device_map = {name: 1 - number % 2 for number, name in enumerate(parts_of(encoder))}
    spread = type(encoder).from_pretrained(encoder.source, dtype=dtype, device_map=device_map)
    assert spread.device == torch.device("cuda:1")
    result = features(spread, pack_of(spread))
    for each, expected in zip(result, features(encoder, pack_of(encoder)), strict=True):
        assert each.device == torch.device("cuda:1")
        assert relative(each, expected) < (1e-4 if dtype == torch.float32 else 3e-2)

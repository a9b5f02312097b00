"""Dropout and drop-path in training: the original's random numbers on a batch are ours on a pack of the same images."""

import pytest
import torch
from originals import read_by_original
from tiny_encoders import GRIDS, patches_of, tiny

import nopad
from nopad.layers.block import drop_path
from nopad.segments import Segments

FAMILIES = ("dinov2", "dinov2 gated", "tipsv2", "dinov3", "dinov3 gated", "pixio", "radio")
STILL = {"pos_embed_rescale": None}
"""DINOv3's coordinates, which are drawn image by image here and batch by batch there, stay."""


def folder_of(family, path, **changes):
    return tiny(family, path, **changes, **(STILL if family.startswith("dinov3") else {}))


def assert_trained_alike(family, folder, tolerance=1e-4):
    encoder, original = nopad.load(folder).train(), read_by_original(family, folder).train()
    images = torch.randn(6, 3, 20, 12)
    pack = nopad.Pack.of(list(images), 4, encoder.patch_order)
    torch.manual_seed(1)
    output = encoder.encode(pack)
    torch.manual_seed(1)
    expected = original(images).last_hidden_state
    number = encoder.num_prefix_tokens
    torch.testing.assert_close(output.prefix_tokens, expected[:, :number], rtol=0, atol=tolerance)
    torch.testing.assert_close(output.tokens, expected[:, number:].flatten(0, 1), rtol=0, atol=tolerance)
    still = encoder.eval().encode(pack).tokens
    assert (output.tokens - still).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_are_dropped_as_the_original_drops_them(family, tmp_path):
    assert_trained_alike(family, folder_of(family, tmp_path, drop_path_rate=0.4))


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_embeddings_are_dropped_as_the_original_drops_them(family, tmp_path):
    assert_trained_alike(family, folder_of(family, tmp_path, hidden_dropout_prob=0.3))


def test_a_segment_is_dropped_as_a_whole():
    segments = Segments.of([3, 0, 1, 5, 2], "cpu")
    rows = torch.ones(11, 4, requires_grad=True)
    seen = torch.zeros(4)
    for _ in range(200):
        dropped = drop_path(rows, segments.cu_seqlens, 0.25)
        values = [part.unique() for part in dropped.split([3, 1, 5, 2])]
        assert all(len(each) == 1 and float(each) in (0.0, pytest.approx(4 / 3)) for each in values)
        seen += torch.cat(values) > 0
    assert seen.min() > 120
    assert seen.max() < 180
    assert drop_path(rows[:0], Segments.of([], "cpu").cu_seqlens, 0.25).shape == (0, 4)


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_dropped_branches_are_dropped_again_in_the_backward(family, tmp_path):
    """Checkpointed layers draw the same numbers again, whole or by their MLPs."""
    folder = folder_of(family, tmp_path, drop_path_rate=0.5)

    def gradients(prepare):
        encoder = nopad.load(folder).train()
        prepare(encoder)
        torch.manual_seed(2)
        encoder(patches_of(encoder), GRIDS).square().sum().backward()
        return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients(lambda encoder: None)
    for prepare in (nopad.PackedEncoder.checkpoint_mlps, nopad.PackedEncoder.activation_checkpointing_enable):
        torch.testing.assert_close(gradients(prepare), expected)


def test_packs_without_gradients_are_random_in_training_after_compile_too(tmp_path):
    encoder = nopad.load(folder_of("dinov2", tmp_path, drop_path_rate=0.5)).train()
    encoder.compile(128, compiled=False)
    with torch.no_grad():
        first, second = (encoder(patches_of(encoder), GRIDS) for _ in range(2))
        assert not torch.equal(first, second)
        encoder.eval()
        assert torch.equal(*(encoder(patches_of(encoder), GRIDS) for _ in range(2)))


def test_dropped_branches_compile(tmp_path, monkeypatch):
    import functools

    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    encoder = nopad.load(folder_of("dinov2", tmp_path, drop_path_rate=0.5)).train()
    encoder.compile_for_training(96, 8)
    outputs = []
    for grids in (GRIDS, GRIDS[:2], GRIDS[1:]):
        output = encoder(patches_of(encoder, grids), grids)
        output.square().sum().backward()
        outputs.append(output)
    assert counter.frame_count == 1
    assert encoder.execution == "compiled"
    assert not torch.equal(outputs[0], encoder(patches_of(encoder), GRIDS))

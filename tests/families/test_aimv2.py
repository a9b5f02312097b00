"""AIMv2: goldens of Apple's code, parity with transformers for every project's own way of writing, lit."""

from __future__ import annotations

import pytest
import torch
from aimv2_checkpoints import apple, early, flat_config, timm, tiny_composite, tiny_original, write
from originals import assert_parity, max_relative, pixels_of
from safetensors.torch import load_file
from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

import nopad


@pytest.mark.parametrize("folder", ["aimv2-apple-learned", "aimv2-apple-native", "aimv2-apple-lit"])
@pytest.mark.parametrize("backwards", [False, True])
def test_goldens_of_apples_own_code(goldens, folder, backwards):
    inputs = load_file(goldens / folder / "inputs.safetensors")
    expected = load_file(goldens / folder / "expected.safetensors")
    numbers = sorted((name.removeprefix("image_") for name in inputs if name.startswith("image_")), reverse=backwards)
    encoder = nopad.load(goldens / folder)
    pack = nopad.Pack.of([inputs[f"image_{i}"][0] for i in numbers], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
    for i, tokens, pooled in zip(numbers, pack.unpack(output.tokens), output.pooled, strict=True):
        assert (tokens.flatten(0, 2) - expected[f"tokens_{i}"]).abs().max() <= 2e-5
        if folder.endswith("lit"):
            assert (pooled - expected[f"pooled_{i}"]).abs().max() <= 2e-5
    if folder.endswith("lit"):
        embeds = torch.stack([expected[f"image_embed_{i}"] for i in numbers])
        assert (output.image_embeds - embeds).abs().max() <= 2e-5
    else:
        assert output.image_embeds is None


# Apple's head has other names and is tested on its golden; timm has none.
BIASED = {"qkv_bias": True, "mlp_bias": True, "use_head": True}
NATIVE = [(dialect, changes) for dialect in (dict, early) for changes in ({}, {"use_head": True}, BIASED)]


@pytest.mark.parametrize(("dialect", "changes"), [*NATIVE, (apple, {}), (timm, {})])
def test_native_dialects_equal_the_original(tmp_path, dialect, changes):
    original = tiny_original(**changes)
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    encoder = nopad.load(write(tmp_path, dialect(original.state_dict()), config))
    assert_parity("aimv2", encoder, original)


@pytest.mark.parametrize("dialect", [lambda state: state, early, apple, timm])
def test_learned_dialects_equal_the_original(tmp_path, dialect):
    original = tiny_original(is_native=False)
    config = flat_config(original) if dialect is apple else original.config.to_dict()
    encoder = nopad.load(write(tmp_path, dialect(original.state_dict()), config))
    assert_parity("aimv2", encoder, original, grids=[(1, 5, 5), (2, 5, 5), (1, 5, 5)])


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_composite_folder_whole_and_sharded(tmp_path, max_shard_size):
    composite = tiny_composite()
    composite.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    encoder = nopad.load(tmp_path)
    pixels = pixels_of([(1, 5, 5), (1, 5, 5)])
    pack = nopad.Pack.of(pixels, 4)
    with torch.no_grad():
        output = encoder.encode(pack)
        vision = composite.vision_model(pixel_values=torch.stack(pixels))
        expected = composite.visual_projection(vision.pooler_output)
    assert max_relative(output.tokens, vision.last_hidden_state.flatten(0, 1)) < 1e-4
    assert max_relative(output.image_embeds, expected) < 1e-4
    assert torch.equal(encoder.embed([]), torch.empty(0, 12))


@pytest.mark.parametrize("dialect", [apple, timm])
def test_bare_file_without_config(tmp_path, dialect):
    original = tiny_original(hidden_size=256, num_attention_heads=2, is_native=False)
    write(tmp_path, dialect(original.state_dict()), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert encoder.config.num_attention_heads == 2
    assert_parity("aimv2", encoder, original, grids=[(1, 5, 5)])


def test_lit_round_trip_keeps_the_projection(tmp_path, goldens):
    encoder = nopad.load(goldens / "aimv2-apple-lit")
    encoder.save_pretrained(tmp_path)
    again = nopad.load(tmp_path)
    assert torch.equal(again.projection.weight, encoder.projection.weight)
    # transformers' vision model has no projection; it must find all that it does have.
    _, info = Aimv2VisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]


def test_learned_positions_are_resampled_with_antialiasing(tmp_path):
    """The original takes the trained grid alone; this is what it gives with a table of another size."""
    original = tiny_original(is_native=False)
    encoder = nopad.load(write(tmp_path, original.state_dict(), original.config.to_dict()))
    pack = nopad.Pack.of(pixels_of([(1, 3, 7), (1, 5, 5), (1, 3, 7)]), 4)
    table = original.embeddings.position_embedding.weight.detach().T.reshape(1, 32, 5, 5)
    small = torch.nn.functional.interpolate(table, (3, 7), mode="bicubic", antialias=True)[0].flatten(1).T
    embedded = original.embeddings.rms_norm(
        original.embeddings.patch_embed(pixels_of([(1, 3, 7)])[0][None]).flatten(2).transpose(1, 2)
    )
    with torch.no_grad():
        tokens = encoder(pack)
        expected = original.rms_norm(original.encoder(inputs_embeds=embedded + small).last_hidden_state)[0]
    assert max_relative(pack.unpack(tokens)[0].flatten(0, 2), expected) < 1e-4


PARAMETERS = {
    "apple/aimv2-large-patch14-224": 309_197_824,
    "apple/aimv2-large-patch14-native": 308_935_680,
    "apple/aimv2-huge-patch14-224": 680_851_968,
    "apple/aimv2-1B-patch14-224": 1_234_958_336,
    "apple/aimv2-3B-patch14-224": 2_720_658_432,
}


def test_published_models_have_their_published_sizes():
    published = nopad.AIMv2Packing.published
    assert len(published) == 16
    for name in published:
        with torch.device("meta"):
            model = nopad.AIMv2Packing(nopad.AIMv2Packing.published_config(name))
        assert model.config.hidden_size // model.config.num_attention_heads == 128
        assert name not in PARAMETERS or model.num_parameters() == PARAMETERS[name]

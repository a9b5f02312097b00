"""What holds for every family alike."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny_encoders
import torch

import nopad
from nopad.families import FAMILIES, family_of_published
from nopad.layers.roles import registered_path

PUBLISHED = [name for family in FAMILIES for name in family.published]


def on_meta(name):
    family = family_of_published(name)
    with torch.device("meta"):
        return family(family.published_config(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layers_that_a_user_can_tap_have_one_name_in_all_families(name):
    encoder = on_meta(name)
    last = encoder.config.num_hidden_layers - 1
    for role in ("embeddings", f"layers.{last}", f"layers.{last}.attention", f"layers.{last}.mlp", "norm"):
        assert encoder.get_submodule(role) is encoder.get_submodule(registered_path(encoder, role))
    assert len(encoder.layers) == last + 1
    assert encoder.get_input_embeddings() is encoder.get_submodule("embeddings.proj")


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_names_are_told_apart_by_one_dialect_of_one_family(name):
    encoder = on_meta(name)
    speaking = [
        (family.family, dialect.name)
        for family in FAMILIES
        for dialect in family.dialects
        if dialect.matches(encoder.state_dict())
    ]
    assert len(speaking) == 1, speaking
    assert speaking[0][0] == encoder.family


def test_a_hook_sees_what_output_hidden_states_gives(goldens):
    for folder in ("aimv2-apple-native", "dinov3-meta", "onevision-encoder"):
        encoder = nopad.load(goldens / folder)
        seen = []
        encoder.layers[1].register_forward_hook(lambda layer, arguments, output, into=seen: into.append(output))
        pack = nopad.Pack.of([torch.randn(3, 3 * encoder.patch_size, 2 * encoder.patch_size)], encoder.patch_size)
        patches = pack.hidden_states if encoder.patch_order == "hwc" else torch.randn_like(pack.hidden_states)
        states = encoder.encode(patches, pack.grid_thw, output_hidden_states=True).hidden_states
        assert torch.equal(states[2], seen[0][encoder.num_prefix_tokens :])


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_forward_gives_all_that_encode_gives(tmp_path, family):
    encoder = nopad.load(tiny_encoders.tiny(family, tmp_path))
    arguments = tiny_encoders.patches_of(encoder), tiny_encoders.GRIDS
    seen = []
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tokens = encoder(*arguments)
        output = encoder(*arguments, output="all", output_hidden_states=True)
        encoded = encoder.encode(*arguments, output_hidden_states=True)
    assert seen[-1] is encoded  # what wraps the forward sees it
    assert torch.equal(output.tokens, tokens)
    assert output.keys() == encoded.keys() >= {"tokens", "pooled", "hidden_states"}
    for name in output.keys() - {"hidden_states"}:
        assert torch.equal(output[name], encoded[name])
    assert all(map(torch.equal, output.hidden_states, encoded.hidden_states))


def test_forward_refuses_other_outputs(goldens):
    encoder = nopad.load(goldens / "dinov3-meta")
    arguments = tiny_encoders.patches_of(encoder), tiny_encoders.GRIDS
    with pytest.raises(ValueError, match=r"output: expected 'tokens', or 'all'.* got 'pooled'"):
        encoder(*arguments, output="pooled")
    with pytest.raises(ValueError, match="which output_hidden_states needs; got 'tokens'"):
        encoder(*arguments, output_hidden_states=True)


def test_a_pack_of_one_family_is_refused_by_another(goldens):
    dinov3, aimv2 = nopad.load(goldens / "dinov3-meta"), nopad.load(goldens / "aimv2-apple-native")
    onevision = nopad.load(goldens / "onevision-encoder")
    image = torch.randint(0, 255, (3, 70, 80), dtype=torch.uint8)
    with pytest.raises(ValueError, match="patch_size 14"):
        dinov3(aimv2.pack([image]))
    with pytest.raises(ValueError, match="patch_order 'hwc'"):
        onevision(aimv2.pack([image]))


def test_importing_nopad_is_light():
    code = "import sys, nopad; assert not {'torch', 'transformers'} & set(sys.modules); nopad.patchify"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("family", tiny_encoders.FAMILIES)
def test_torchs_own_compiler_takes_an_encoder(tmp_path, family):
    encoder = nopad.load(tiny_encoders.tiny(family, tmp_path))
    patches, grids = tiny_encoders.patches_of(encoder), tiny_encoders.GRIDS
    with torch.no_grad():
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(encoder, backend="eager")(patches, grids), encoder(patches, grids))

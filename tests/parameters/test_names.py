"""Parameters by name and shape: the original's in memory, each dialect's in a file, roles in code."""

from __future__ import annotations

from dataclasses import replace

import aimv2_checkpoints
import dinov3_checkpoints
import moonvit_checkpoints
import onevision_checkpoints
import pixtral_checkpoints
import pytest
import torch
from originals import original_class, read_by_original
from own_parameters import WITH_A_HEAD, blank, every_family, features, same, spoken_by, stored
from tiny_encoders import GRIDS, patches_of, relative
from torch import nn

import nopad

GOLDENS = {
    "aimv2-apple-native": "aimv2",
    "aimv2-apple-learned": "aimv2",
    "aimv2-apple-lit": "aimv2",
    "open-clip": "clip",
    "dinov2-meta": "dinov2",
    "dinov2-meta-registers-swiglu": "dinov2 gated",
    "dinov3-meta": "dinov3",
    "dinov3-meta-swiglu": "dinov3",
    "onevision-encoder": "onevision",
    "preview-v0-packing": "onevision",
}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@every_family
def test_names_and_shapes_are_those_of_the_original(family, folder, encoder):
    original = read_by_original(family, folder)
    assert shapes(encoder.state_dict()) == shapes(original.state_dict())
    other = blank(encoder)
    other.load_state_dict(original.state_dict())
    assert same(other.state_dict(), original.state_dict())
    assert torch.equal(features(other), features(encoder))
    randomised = original_class(family)(original.config)
    assert not same(randomised.state_dict(), encoder.state_dict())
    randomised.load_state_dict(encoder.state_dict())
    assert same(randomised.state_dict(), original.state_dict())


@pytest.mark.parametrize(("golden", "family"), GOLDENS.items())
def test_other_dialects_have_the_names_of_the_original_in_memory(goldens, golden, family):
    encoder = nopad.load(goldens / golden)
    config_class = original_class(family).config_class
    names = config_class().to_dict()
    fields = {name: value for name, value in encoder.config.to_dict().items() if name in names}
    with torch.device("meta"):
        original = original_class(family)(config_class(**fields))
    extra = set() if encoder.projection is None else {"visual_projection.weight"}
    ours = shapes(encoder.state_dict())
    assert extra <= ours.keys()
    assert {name: shape for name, shape in ours.items() if name not in extra} == shapes(original.state_dict())


@every_family
def test_every_dialects_table_leads_there_and_back(family, encoder):
    state = encoder.state_dict()
    for dialect in spoken_by(encoder):
        file = dialect.table.to_file(state)
        assert dialect.matches(file)
        checkpoint = replace(stored(file), config=encoder.config.to_dict())
        tensors = dialect.convert(dialect.select(checkpoint)).tensors
        assert {name: tensors[name].shape for name in state} == shapes(state)
        assert same({name: tensors[name].read() for name in state}, state)
        masked = {name: tensors[name].read() for name in tensors.keys() - state.keys()}
        assert all(name.endswith("attention.k_proj.bias") and not bias.any() for name, bias in masked.items())
        assert bool(masked) == (
            dialect.name.startswith("Meta") and family.startswith("dinov3") and not encoder.config.key_bias
        )


@pytest.mark.parametrize(
    ("family", "dialect", "write"),
    [
        ("aimv2", "early transformers", aimv2_checkpoints.early),
        ("aimv2", "Apple", aimv2_checkpoints.apple),
        ("aimv2", "timm", aimv2_checkpoints.timm),
        ("moonvit", "Moonshot", moonvit_checkpoints.moonshot),
        ("pixtral", "Mistral", pixtral_checkpoints.mistral),
        ("onevision", "preview v0", onevision_checkpoints.preview),
    ],
)
def test_tables_write_what_each_project_writes(encoder, dialect, write):
    (spoken,) = (each for each in encoder.dialects if each.name == dialect)
    state = encoder.state_dict()
    assert same(spoken.table.to_file(state), write(state))


@pytest.mark.parametrize("variant", [each for each in dinov3_checkpoints.VARIANTS if each != "value bias alone"])
def test_tables_write_what_meta_writes(tmp_path, variant):
    original = dinov3_checkpoints.tiny_original(**dinov3_checkpoints.VARIANTS[variant])
    encoder = nopad.load(dinov3_checkpoints.save(tmp_path, original))
    (dialect,) = (each for each in spoken_by(encoder) if each.name.startswith("Meta"))
    written = dialect.select(stored(dinov3_checkpoints.meta(original))).tensors  # what is masked is zero
    assert same(dialect.table.to_file(encoder.state_dict()), {name: t.read() for name, t in written.items()})


@every_family
def test_parts_are_reached_and_set_by_role(family, encoder):
    before, names = features(encoder), encoder.state_dict().keys()
    path = {"dinov2": "encoder.layer", "dinov3": "model.layer", "vit": "layers"}
    path |= {"pixtral": "transformer.layers", "moonvit": "layers", "qwen2_vl": "blocks", "qwen3_vl": "blocks"}
    path |= {"radio": "encoder.layer", "pe": "transformer.resblocks"}
    path = path.get(encoder.family, "encoder.layers")
    assert encoder.layers is encoder.get_submodule(path)
    norm = {
        "aimv2": "rms_norm",
        "siglip2": "post_layernorm",
        "clip": "post_layernorm",
        "dinov2": "layernorm",
        "dinov3": "norm",
        "moonvit": "final_layernorm",
        "onevision": "layernorm_post",
        "vit": "layernorm",
    }
    if family == "pe":
        norm["pe"] = "ln_post"
    assert encoder.norm is (encoder.get_submodule(norm[encoder.family]) if encoder.family in norm else None)
    attention = dict.fromkeys(("siglip2", "clip", "onevision"), "self_attn")
    attention |= dict.fromkeys(("qwen2_vl", "qwen3_vl", "moonvit", "pe"), "attn")
    attention = attention.get(encoder.family, "attention")
    mlp = {"aimv2": "ffn", "pixtral": "feed_forward"}.get(encoder.family, "mlp")
    for number, layer in enumerate(encoder.layers):
        assert layer.attention is encoder.get_submodule(f"{path}.{number}.{attention}")
        assert layer.mlp is encoder.get_submodule(f"{path}.{number}.{mlp}")
    assert (getattr(encoder, "head", None) is not None) == (family in WITH_A_HEAD)

    encoder.layers = encoder.layers[:1]
    assert encoder.get_submodule(path) is encoder.layers
    assert encoder.state_dict().keys() == {n for n in names if not n.startswith((f"{path}.1.", f"{path}.2."))}
    states = encoder.encode(patches_of(encoder), GRIDS, output_hidden_states=True).hidden_states
    assert len(states) == 2
    fewer = features(encoder)
    assert relative(fewer, before) > 1e-3

    encoder.layers[0].mlp = nn.Identity()
    assert type(encoder.get_submodule(f"{path}.0.{mlp}")) is nn.Identity
    assert not [name for name in encoder.state_dict() if name.startswith(f"{path}.0.{mlp}.")]
    without = features(encoder)
    assert relative(without, fewer) > 1e-3

    if encoder.family in norm:
        encoder.norm = nn.Identity()
        assert type(encoder.get_submodule(norm[encoder.family])) is nn.Identity
        assert relative(features(encoder), without) > 1e-3
    if family in WITH_A_HEAD:
        encoder.head = None
        assert not [name for name in encoder.state_dict() if name.startswith(("head.", "pooler.", "attn_pool."))]
        output = encoder.encode(patches_of(encoder), GRIDS)
        first = int(GRIDS[0].prod())
        by_cls = encoder.num_prefix_tokens and family != "pe"
        plain = output.prefix_tokens[0, 0] if by_cls else output.tokens[:first].mean(dim=0)
        torch.testing.assert_close(output.pooled[0], plain)

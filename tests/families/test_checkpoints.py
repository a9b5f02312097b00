"""What holds for checkpoints of all families. Meta's of DINOv3, with tensors of their own, are in test_dinov3.py."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys

import pytest
import torch
from aimv2_checkpoints import write
from originals import read_by_original
from renaming import in_memory
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, GRIDS, encoder_class, on_meta, patches_of, tiny

import nopad
from nopad import families
from nopad.align.reference_model import RemoteCodeReference
from nopad.align.references import reference_of
from nopad.align.run import align
from nopad.families import ENCODERS, family_of_published
from nopad.layers.roles import registered_path

CLASSES = [families.encoder_class(family) for family in ENCODERS]
PUBLISHED = [
    name
    for family in CLASSES
    for name in {json.dumps(family.published_config(name).to_dict()): name for name in family.published}.values()
]
"""One published name for each config."""
SMALLEST = {
    cls.published_config(name).model_type: name
    for cls in CLASSES
    for name in sorted(cls.published, key=lambda name: -cls.published[name]["hidden_size"])
}.values()
"""One published name for each class of config."""
# What else tells timm's models of a family apart: their layers, their patch embedding. DINOv2's have no mask token,
# Qwen3-VL's kernels of one frame, and I-JEPA's the names of SigLIP's.
TIMM = {
    "dinov2": "",
    "dinov2 gated": "",
    "tipsv2": "",
    "qwen3_vl": "",
    "qwen3_5": "",
    "ijepa": "",
    "siglip2": "timm, NaFlex",
    "dinov3 gated": "timm, gated",
}
DIALECTS = [
    (family, dialect.name)
    for family in FAMILIES
    for dialect in encoder_class(family).dialects
    if (family.split()[0], dialect.name.split(",")[0]) != ("dinov3", "Meta")
    and (family, dialect.name) != ("dinov2 gated", "transformers, TIPSv2")  # which are Meta's of a gated layer
    and (family, dialect.name) not in (("pe lang", "Meta, both towers"), ("pe lang", "OpenCLIP"))  # which have a head
    and (not dialect.name.startswith("timm") or dialect.name == TIMM.get(family, "timm"))
]
PREFIXES = [
    (family, dialect.name, prefix)
    for family in FAMILIES
    for dialect in encoder_class(family).dialects
    for prefix in dialect.prefixes
    if (family, dialect.name) in DIALECTS
]

every_family = pytest.mark.parametrize("family", FAMILIES)
every_dialect = pytest.mark.parametrize(("family", "dialect"), DIALECTS)
every_published = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes the checkpoint of a family, once for all tests, its original and its encoder; they only read them."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(family):
        torch.manual_seed(0)
        folder = tiny(family, root / family)
        return folder, read_by_original(family, folder), nopad.load(folder)

    return make


@pytest.fixture(scope="module")
def spoken(made, tmp_path_factory):
    """Makes the same checkpoint in a dialect, once as well."""
    root = tmp_path_factory.mktemp("dialects")

    @functools.cache
    def make(family, dialect):
        (spoken,) = (each for each in encoder_class(family).dialects if each.name == dialect)
        original = made(family)[1]
        state = spoken.table.to_file(in_memory(family, original.state_dict()))
        return write(root / family / dialect.replace("/", "_"), state, original.config.to_dict())

    return make


@pytest.fixture
def folder(made, family):
    return made(family)[0]


@pytest.fixture
def original(made, family):
    return made(family)[1]


@pytest.fixture
def loaded(made, family):
    return made(family)[2]


@pytest.fixture
def checkpoint(spoken, family, dialect):
    return spoken(family, dialect)


@every_dialect
def test_dialect_is_loaded_and_saved_as_the_originals(family, dialect, folder, checkpoint, original, tmp_path):
    """In another patch order than the family's own, which changes no weight."""
    patch_order = "hwc" if family in ("onevision", "qwen3_vl", "qwen3_5", "radio") else "chw"
    encoder = nopad.load(checkpoint, patch_order=patch_order)
    assert type(encoder) is encoder_class(family)
    assert (encoder.dialect, encoder.patch_order) == (dialect, patch_order)
    encoder.save_pretrained(saved := tmp_path / "saved")
    assert load_file(saved / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    reloaded, again = in_memory(family, read_by_original(family, saved).state_dict()), nopad.load(saved)
    assert again.patch_order == patch_order
    for name, tensor in in_memory(family, original.state_dict()).items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
        assert torch.equal(reloaded[name], tensor), name
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("family", "dialect", "prefix"), PREFIXES)
def test_prefix_of_a_tower_is_taken_off(checkpoint, loaded, original, prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    encoder = nopad.load(write(tmp_path / "prefixed", state, original.config.to_dict()))
    expected = loaded.state_dict()
    assert encoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in encoder.state_dict().items())


@every_family
def test_every_tensor_is_needed(family, tmp_path):
    folder = tiny(
        family, tmp_path / "checkpoint", num_hidden_layers=2
    )  # one tells the dialect where the other does not
    state, config = load_file(folder / "model.safetensors"), read_by_original(family, folder).config.to_dict()
    for name in state:
        if ".1." in name:  # the second layer tells the dialect where a tensor of the first does not
            continue
        rest = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=rf"missing.*{re.escape(name)}|{re.escape(name)}.* is missing"):
            nopad.load(write(tmp_path / "rest", rest, config))


@every_dialect
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_damaged_tensor_is_named(checkpoint, original, damage, tmp_path):
    state = load_file(checkpoint / "model.safetensors")
    down = (
        r"1\..*(fc2|down_proj|weights_out|w3|c_proj)\.weight$|layer\.1\.output\.dense\.weight$"
        r"|encoder\.blocks\.1\.mlp\.fc1\.weight$"
    )
    name = next(name for name in state if re.search(down, name))
    if damage == "missing":
        del state[name]
    elif damage == "unexpected":
        name = name.replace(".weight", ".surprise")
        state[name] = torch.zeros(3)
    else:
        state[name] = state[name].T.contiguous()
    damaged = write(tmp_path, state, original.config.to_dict())
    with pytest.raises(ValueError, match=rf"1 {damage}: {re.escape(name)}"):
        nopad.load(damaged)


@every_family
def test_folder_can_be_saved_over(family, tmp_path):
    encoder = nopad.load(folder := tiny(family, tmp_path))
    weight = encoder.get_parameter(registered_path(encoder, "layers.0.norm1.weight"))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
    encoder.save_pretrained(folder)
    saved = nopad.load(folder)
    assert torch.equal(saved.get_parameter(registered_path(saved, "layers.0.norm1.weight")), before * 2)


@every_family
def test_transformers_ways_in_load_the_same(family, folder):
    expected = nopad.load(folder)
    cls = type(expected)
    for encoder in (
        cls(folder),
        cls(str(folder), attention="eager"),
        cls.from_pretrained(folder, attn_implementation="sdpa"),
        cls.from_pretrained(folder, device_map="cpu"),
    ):
        assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in encoder.state_dict().items())
        torch.testing.assert_close(encoder(patches_of(encoder), GRIDS), expected(patches_of(expected), GRIDS))
    assert cls.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"attention: .*'flash_attention_9'"):
        nopad.load(folder, attention="flash_attention_9")


@every_family
def test_fresh_weights_are_all_drawn(family, folder, monkeypatch):
    """No parameter keeps what its memory held before."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(1e9))
    encoder = encoder_class(family)(nopad.load(folder).config)
    for name, parameter in encoder.named_parameters():
        assert parameter.abs().max() <= 5, name


@every_published
def test_published_model_has_the_parameters_of_its_original(name):
    encoder = published_on_meta(name)
    reference = reference_of(encoder)
    if isinstance(reference, RemoteCodeReference) or reference.why_missing():
        pytest.skip("the original's code is not part of transformers")
    with on_meta():
        original = reference.class_of(encoder)(reference.config(encoder), **reference.arguments(encoder))
    projection = 0 if encoder.projection is None else encoder.projection.weight.numel()  # of the whole model
    ours, optional = encoder.state_dict(), getattr(original, "_keys_to_ignore_on_load_missing", None) or ()
    left_out = sum(
        parameter.numel()
        for name, parameter in original.named_parameters()
        if name not in ours and any(re.search(pattern, name) for pattern in optional)
    )
    assert encoder.num_parameters() == original.num_parameters() + projection - left_out


@functools.cache
def published_on_meta(name):
    family = family_of_published(name)
    with on_meta():
        return family(family.published_config(name))


@every_published
def test_published_model_has_the_roles_that_users_tap(name):
    encoder = published_on_meta(name)
    last = encoder.config.num_hidden_layers - 1
    norm = ["norm"] * (encoder.norm is not None)
    for role in ("embeddings", f"layers.{last}", f"layers.{last}.attention", f"layers.{last}.mlp", *norm):
        assert encoder.get_submodule(role) is encoder.get_submodule(registered_path(encoder, role))
    assert len(encoder.layers) == last + 1
    assert encoder.get_input_embeddings() is encoder.get_submodule("embeddings.proj")


@every_published
def test_saved_names_are_of_one_dialect_of_one_family(name):
    encoder = published_on_meta(name)
    state = encoder.state_dict()
    (spoken,) = ((family, dialect) for family in CLASSES for dialect in family.dialects if dialect.matches(state))
    assert isinstance(encoder, spoken[0])  # fixed-size SigLIP is a class of its own
    assert spoken[1].is_original


@pytest.mark.parametrize("name", SMALLEST)
def test_untrained_is_the_same_every_time(name, monkeypatch):
    family = family_of_published(name)
    small = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 64, "num_attention_heads": 2}
    published = family.published[name]
    small |= {key: 64 for key in ("embed_dim", "out_hidden_size", "projection_dim") if published.get(key)}
    monkeypatch.setitem(family.published, name, published | small)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second = nopad.load(f"untrained:{name}"), nopad.load(f"untrained:{name}", dtype=torch.bfloat16)
    assert torch.equal(torch.rand(1), expected)  # the random state is left alone
    assert isinstance(first, family)
    assert second.dtype == torch.bfloat16
    assert family.from_pretrained(f"untrained:{name}", dtype="bfloat16").dtype == torch.bfloat16
    for key, tensor in first.named_parameters():
        assert torch.equal(second.state_dict()[key], tensor.to(torch.bfloat16))
        assert tensor.std() > 0
    assert all(map(torch.equal, first.buffers(), second.buffers()))
    with pytest.raises(ValueError, match=rf"expected the name of a published .*{re.escape(name)}"):
        family.published_config("nobody/nothing")
    reference = reference_of(first)
    if not isinstance(reference, RemoteCodeReference) and not reference.why_missing():
        report = align(f"untrained:{name}")
        assert report.passed, [case.failures for case in report.cases]
        assert report.weights == "seeded random"


def test_unknown_published_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"expected the name of a published aimv2 model, one of apple/aimv2"):
        nopad.AIMv2Packing.from_pretrained("untrained:someone/else")
    with pytest.raises(ValueError, match="expected the name of a published model; `nopad models` lists them"):
        nopad.load("untrained:someone/else")


def test_a_model_is_loaded_with_the_modules_of_its_family_alone():
    code = (
        "import sys, transformers.models.auto.modeling_auto; before = set(sys.modules); import nopad; "
        "nopad.load('untrained:facebook/dinov3-vits16-pretrain-lvd1689m'); "
        "new = sorted(set(sys.modules) - before); "
        "print(*(name for name in new if name.startswith(('transformers.models.', 'nopad.families.', 'nopad.align'))))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [
        "nopad.families.dinov3",
        "nopad.families.dinov3_checkpoints",
        "transformers.models.dinov3_vit",
        "transformers.models.dinov3_vit.configuration_dinov3_vit",
    ]

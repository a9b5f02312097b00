"""CLIP: goldens of OpenCLIP's and timm's code, parity with transformers for every way of writing, projections."""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import write
from clip_checkpoints import composite, open_clip, open_clip_config, run, save, tiny_original
from originals import assert_parity, read_by_original
from safetensors.torch import load_file
from transformers.models.clip.modeling_clip import CLIPForImageClassification, CLIPVisionModel

import nopad
from nopad.align.run import align
from nopad.families.clip import CLIPPacking, MetaCLIP2Packing
from nopad.families.clip_checkpoints import CLIPPackingConfig, MetaCLIP2PackingConfig


def save_open_clip(folder, original, config="open_clip_config.json", weights="open_clip_pytorch_model.bin"):
    folder.mkdir(exist_ok=True)
    torch.save(open_clip(original), folder / weights)
    if config is not None:
        (folder / config).write_text(json.dumps(open_clip_config(original)))
    return folder


@pytest.mark.parametrize(
    ("folder", "dialect", "activation"),
    [
        ("open-clip", "OpenCLIP", "gelu"),
        ("open-clip-quickgelu", "OpenCLIP", "quick_gelu"),
        ("timm-clip-projection", "timm", "quick_gelu"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_goldens_of_the_original_code(goldens, folder, dialect, activation, backwards):
    inputs = load_file(goldens / folder / "inputs.safetensors")
    expected = load_file(goldens / folder / "expected.safetensors")
    numbers = sorted((name.removeprefix("image_") for name in inputs if name != "input_ids"), reverse=backwards)
    encoder = nopad.load(goldens / folder)
    assert (encoder.family, encoder.dialect) == ("clip", dialect)
    assert (encoder.config.hidden_act, encoder.projection_dim) == (activation, 24)
    pack = nopad.Pack.of([inputs[f"image_{i}"][0] for i in numbers], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
    for i, tokens, embed in zip(numbers, pack.unpack(output.tokens), output.image_embeds, strict=True):
        assert (tokens.flatten(0, 2) - expected[f"tokens_{i}"]).abs().max() <= 2e-5
        assert (embed - expected[f"image_embed_{i}"]).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["clip", "metaclip2"])
@pytest.mark.parametrize("written", ["composite", "projecting", "OpenCLIP"])
def test_projection_is_that_of_the_original(tmp_path, kind, written):
    """In the whole model, the vision model with a projection and OpenCLIP's file; the text tower is left out."""
    whole = tiny_original(kind, with_projection=True) if written == "projecting" else composite(kind)
    if written == "OpenCLIP":
        whole.config.vision_config.projection_dim = whole.config.projection_dim
        original = whole.vision_model
        state, config = open_clip(whole), open_clip_config(original)
        (write(tmp_path / "in", state, None) / "open_clip_config.json").write_text(json.dumps(config))
    else:
        original = whole.vision_model
        whole.save_pretrained(tmp_path / "in")
    encoder = nopad.load(tmp_path / "in")
    assert_parity(kind, encoder, original, [(1, 5, 5)] if written == "OpenCLIP" else None, tolerance=1e-5)
    image = torch.randn(3, 20, 20)
    pack = nopad.Pack.of([image], 4, encoder.patch_order)
    with torch.no_grad():
        pooled = run(original, image)[1]
        torch.testing.assert_close(encoder.encode(pack).image_embeds[0], whole.visual_projection(pooled))
        encoder.save_pretrained(tmp_path / "out")
        again = nopad.load(tmp_path / "out")
        assert torch.equal(again.encode(pack).image_embeds, encoder.encode(pack).image_embeds)
    if written != "OpenCLIP":  # which does not say of which kind it is
        assert type(encoder.config) is (MetaCLIP2PackingConfig if kind == "metaclip2" else CLIPPackingConfig)
        read_by_original(kind, tmp_path / "out")  # nothing missing, nothing left over


def test_projection_that_the_config_promises_is_needed(tmp_path):
    whole = composite()
    state = {name: tensor for name, tensor in whole.state_dict().items() if name != "visual_projection.weight"}
    config = {**whole.config.to_dict(), "architectures": ["CLIPModel"]}
    with pytest.raises(ValueError, match=r"1 missing: visual_projection\.weight"):
        nopad.load(write(tmp_path, state, config))


def test_width_of_the_projection_is_that_of_the_whole_model(tmp_path):
    whole = composite()
    config = whole.config.to_dict()
    config["vision_config"]["projection_dim"] = 40  # a width that transformers' whole model does not read
    assert nopad.load(write(tmp_path, whole.state_dict(), config)).projection_dim == 24
    with pytest.raises(ValueError, match=r"misshapen: visual_projection\.weight \(got \(24, 32\), expected \(25, 32\)"):
        nopad.load(write(tmp_path, whole.state_dict(), {**config, "projection_dim": 25}))


def test_position_ids_of_older_files_are_dropped(tmp_path):
    whole = composite()
    ids = {f"{tower}.embeddings.position_ids": torch.arange(26)[None] for tower in ("vision_model", "text_model")}
    folder = write(tmp_path, {**whole.state_dict(), **ids}, whole.config.to_dict())
    assert_parity("clip", nopad.load(folder), whole.vision_model)


def test_classifier_is_dropped_and_its_backbone_loads(tmp_path):
    original = CLIPForImageClassification(composite().config).eval()
    original.save_pretrained(tmp_path)
    assert "classifier.weight" in load_file(tmp_path / "model.safetensors")
    encoder = nopad.load(tmp_path)
    assert encoder.projection is None
    assert_parity("clip", encoder, original.vision_model)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
        {"hidden_size": 160, "num_attention_heads": 2},  # heads of 80, as H
        {"hidden_size": 176, "num_attention_heads": 2},  # 88, as g
        {"hidden_size": 208, "num_attention_heads": 2},  # 104, as bigG
        {"image_size": 20, "patch_size": 5},
    ],
    ids=str,
)
def test_variants_of_the_architecture(tmp_path, changes):
    original = tiny_original(**changes)
    encoder = nopad.load(save(tmp_path / "in", original))
    assert encoder.num_parameters() == original.num_parameters()
    assert_parity("clip", encoder, original, tolerance=1e-5)
    encoder.save_pretrained(tmp_path / "out")
    assert_parity("clip", encoder, read_by_original("clip", tmp_path / "out"), tolerance=1e-5)


@torch.no_grad()
def test_last_hidden_state_of_transformers_is_the_last_of_hidden_states(tmp_path):
    original = tiny_original()
    encoder = nopad.load(save(tmp_path, original))
    image = torch.randn(3, 12, 20)
    states = encoder.encode(nopad.Pack.of([image], 4), output_hidden_states=True).hidden_states
    expected = original(pixel_values=image[None], interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(states[-1], expected.last_hidden_state[0, 1:])
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs[0, 1:])


@pytest.mark.parametrize("weights", ["open_clip_pytorch_model.bin", "renamed.pt"])
def test_open_clips_files_are_read(tmp_path, weights):
    original = tiny_original(with_projection=True, hidden_act="gelu", image_size=20)
    encoder = nopad.load(save_open_clip(tmp_path, original, weights=weights))
    assert (encoder.dialect, encoder.config.positions_antialias) == ("OpenCLIP", True)
    assert_parity("clip", encoder, original.vision_model, [(1, 5, 5)], tolerance=1e-5)
    assert (encoder.preprocessing.size, encoder.preprocessing.mean) == (20, (0.5, 0.4, 0.3))
    report = align(tmp_path)
    assert report.passed
    assert report.weights == "OpenCLIP names, converted by nopad to transformers names"


def test_of_two_configs_in_a_folder_each_layout_has_its_own(tmp_path):
    """LAION's folders hold both: `config.json` of one model, `open_clip_config.json` of the other."""
    original = tiny_original(with_projection=True, hidden_act="gelu", image_size=20)
    other = tiny_original(with_projection=True, image_size=20)
    save_open_clip(tmp_path, original)
    other.save_pretrained(tmp_path)
    encoder = nopad.load(tmp_path)
    assert (encoder.dialect, encoder.config.hidden_act) == ("transformers", "quick_gelu")
    encoder = nopad.load(tmp_path / "open_clip_pytorch_model.bin")
    assert (encoder.dialect, encoder.config.hidden_act) == ("OpenCLIP", "gelu")
    (tmp_path / "open_clip_config.json").unlink()
    assert nopad.load(tmp_path / "open_clip_pytorch_model.bin").config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("place", "changes", "expected"),
    [
        ("vision_cfg", {"no_ln_pre": True}, "no_ln_pre: expected False, the only one that is implemented, got True"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type: expected 'tok'"),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}, "norm_kwargs: expected None"),
        ("vision_cfg", {"mistyped": 1}, "not implemented: mistyped"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, r"layers: expected an integer ≥ 1, got \[3"),
        ("vision_cfg", {"mlp_ratio": "4"}, "mlp_ratio: expected a number > 0, got '4'"),
        ("vision_cfg", {"head_width": 0}, "head_width: expected an integer ≥ 1, got 0"),
        ("vision_cfg", {"width": 64}, "hidden_size: got 64|misshapen"),
        ("model_cfg", {"quick_gelu": 1}, "quick_gelu: expected true or false, got 1"),
        ("model_cfg", {"vision_cfg": None}, "expected model_cfg with a vision_cfg"),
        ("model_cfg", {"embed_dim": 25}, r"misshapen: visual\.proj \(got \(32, 24\), expected \(32, 25\)\)"),
    ],
    ids=str,
)
def test_open_clip_configs_that_nothing_implements_are_refused(tmp_path, place, changes, expected):
    folder = save_open_clip(tmp_path, tiny_original(with_projection=True))
    config = json.loads((folder / "open_clip_config.json").read_text())
    (config["model_cfg"] if place == "model_cfg" else config["model_cfg"]["vision_cfg"]).update(changes)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{folder}.*{expected}"):
        nopad.load(folder)


def test_sides_in_an_open_clip_config_may_be_two_equal_numbers(tmp_path):
    folder = save_open_clip(tmp_path, tiny_original(with_projection=True))
    expected = nopad.load(folder).config.to_dict()
    config = json.loads((folder / "open_clip_config.json").read_text())
    sides = config["model_cfg"]["vision_cfg"]
    sides.update({name: [sides[name]] * 2 for name in ("image_size", "patch_size")})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert nopad.load(folder).config.to_dict() == expected


@pytest.mark.parametrize("mode", ["squash", "longest"])
def test_open_clips_way_to_resize(tmp_path, mode):
    folder = save_open_clip(tmp_path, tiny_original(with_projection=True))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["resize_mode"] = mode
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    if mode == "squash":
        assert (encoder.preprocessing.rule, encoder.preprocessing.size) == ("square", 22)
    else:
        with pytest.raises(ValueError, match="longest"):
            _ = encoder.preprocessing


def test_bare_file_does_not_tell_the_activation(tmp_path):
    original = tiny_original(hidden_size=768, num_attention_heads=12, num_hidden_layers=1, image_size=20)
    folder = write(tmp_path, original.state_dict(), None)
    with pytest.raises(ValueError, match=r"activation, quick_gelu or gelu.*add the checkpoint's config\.json"):
        nopad.load(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_act": "quick_gelu"}))
    encoder = nopad.load(folder)
    assert encoder.config.num_attention_heads == 12
    assert_parity("clip", encoder, original, tolerance=1e-5)
    narrow = write(tmp_path / "narrow", tiny_original().state_dict(), {"hidden_act": "quick_gelu"})
    with pytest.raises(ValueError, match=r"published widths \[768, .*width is 32"):
        nopad.load(narrow)


@pytest.mark.parametrize("model_type", ["chinese_clip_vision_model", "clipseg_vision_model", "altclip_vision_model"])
def test_other_architectures_with_the_same_names_are_refused(tmp_path, model_type):
    original = tiny_original()
    folder = write(tmp_path, original.state_dict(), {**original.config.to_dict(), "model_type": model_type})
    with pytest.raises(ValueError, match=rf"expected model_type clip or .* got '{model_type}'"):
        nopad.load(folder)


def test_timms_projection_has_no_bias(goldens, tmp_path):
    case = goldens / "timm-clip-projection"
    state, config = load_file(case / "model.safetensors"), json.loads((case / "config.json").read_text())
    with pytest.raises(ValueError, match=r"head\.bias: expected zeros"):
        nopad.load(write(tmp_path, {**state, "head.bias": torch.ones(24)}, config))
    with pytest.raises(ValueError, match=r"1 missing: head\.weight"):
        nopad.load(write(tmp_path, {name: state[name] for name in state if name != "head.weight"}, config))
    config["pretrained_cfg"]["tag"] = "openai_ft_in1k"
    assert nopad.load(write(tmp_path, {**state, "head.bias": torch.ones(24)}, config)).projection is None


def test_fresh_weights_are_drawn_as_the_originals():
    torch.manual_seed(0)
    fields = {
        **tiny_original().config.to_dict(),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
    }
    encoder = nopad.CLIPPacking(CLIPPackingConfig(**fields, with_projection=True))
    original = CLIPVisionModel(CLIPVisionModel.config_class(**fields))
    for name, parameter in original.named_parameters():
        ours = encoder.get_parameter(name)
        assert float(ours.std(correction=0)) == pytest.approx(float(parameter.std(correction=0)), rel=0.2), name
        assert float(ours.mean()) == pytest.approx(float(parameter.mean()), abs=0.02), name
    assert float(encoder.projection.weight.std()) == pytest.approx(256**-0.5, rel=0.1)


# Of the vision models alone, counted by transformers' own.
PARAMETERS = {
    "openai/clip-vit-base-patch32": 87_456_000,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": 630_766_080,
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K": 1_011_203_840,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": 1_842_777_344,
    "facebook/metaclip-2-worldwide-huge-quickgelu": 630_766_080,
}


def test_published_models_have_their_published_sizes():
    assert len(nopad.CLIPPacking.published) == 28
    for name, expected in PARAMETERS.items():
        with torch.device("meta"):
            encoder = nopad.CLIPPacking(nopad.CLIPPacking.published_config(name))
        assert encoder.num_parameters() - encoder.projection.weight.numel() == expected, name


def test_a_subclass_takes_both_configs_and_stays_itself():
    class Mine(CLIPPacking):
        pass

    for family, kind in (("clip", CLIPPackingConfig), ("metaclip2", MetaCLIP2PackingConfig)):
        config = kind(**tiny_original(family).config.to_dict())
        assert type(Mine(config)) is Mine
        assert type(CLIPPacking(config)) is (MetaCLIP2Packing if family == "metaclip2" else CLIPPacking)
    with pytest.raises(TypeError, match="config: expected MetaCLIP2PackingConfig, got CLIPPackingConfig"):
        MetaCLIP2Packing(CLIPPackingConfig(**tiny_original("clip").config.to_dict()))

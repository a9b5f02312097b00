"""timm's checkpoints: tokens of timm's own models, its config read or refused, its images."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import nopad
from nopad.align.run import align
from nopad.preprocessing.rules import Preprocessing

CASES = {
    "timm-aimv2": "aimv2",
    "timm-aimv2-dynamic": "aimv2",
    "timm-dinov2": "dinov2",
    "timm-dinov2-gated": "dinov2",
    "timm-dinov2-registers": "dinov2",
    "timm-tipsv2": "dinov2",
    "timm-dinov3": "dinov3",
    "timm-dinov3-gated": "dinov3",
    "timm-siglip": "siglip2",
    "timm-siglip-tanh": "siglip2",
    "timm-siglip-gap": "siglip2",
    "timm-clip": "clip",
    "timm-vit": "vit",
    "timm-naflexvit": "siglip2",
    "timm-qwen3": "qwen3_vl",
    "timm-pe-core": "pe",
    "timm-pe-lang": "pe",
    "timm-pe-spatial": "pe",
}


@pytest.fixture
def copy(goldens, tmp_path):
    """Takes the name of a case and changes to `model_args`; returns a folder with them."""

    def made(case, **changes):
        folder = tmp_path / case
        shutil.copytree(goldens / case, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["model_args"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return made


def tokens_of(encoder, case, order):
    images = load_file(case / "inputs.safetensors")
    numbers = [*range(len(images))][::order]
    pack = nopad.Pack.of([images[f"image_{number}"][0] for number in numbers], 4, encoder.patch_order)
    output = encoder.encode(pack)
    return numbers, [tokens.flatten(0, 2) for tokens in pack.unpack(output.tokens)], output.pooled


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("case", CASES)
def test_goldens_of_timms_own_models(goldens, case, order):
    encoder = nopad.load(goldens / case)
    assert (encoder.family, encoder.dialect.split(",")[0]) == (CASES[case], "timm")
    expected = load_file(goldens / case / "expected.safetensors")
    with torch.no_grad():
        for number, tokens, pooled in zip(*tokens_of(encoder, goldens / case, order), strict=True):
            assert torch.allclose(tokens, expected[f"tokens_{number}"], atol=2e-5, rtol=0)
            assert torch.allclose(pooled, expected[f"pooled_{number}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", [*CASES, "timm-clip-projection", "timm-pe-core-projection"])
@torch.no_grad()
def test_features_of_layers_are_timms_forward_intermediates(goldens, case):
    encoder = nopad.load(goldens / case)
    inputs = load_file(goldens / case / "inputs.safetensors")
    expected = load_file(goldens / case / "intermediates.safetensors")
    images = [inputs[f"image_{number}"][0] for number in range(min(len(inputs), 2))]
    pack = nopad.Pack.of(images, 4, encoder.patch_order)
    compared = set()
    for kind, layers in (("plain", [0, 1]), ("normed", [0])):
        features = encoder.features(pack, layers, norm=kind == "normed", format="chw")
        for number, actual in enumerate(features):
            for place, layer in enumerate(layers):
                name = f"{kind}_{layer}_{number}"
                torch.testing.assert_close(actual.tokens[place, 0], expected[name], atol=2e-5, rtol=0)
                compared.add(name)
                if actual.prefix_tokens is not None:
                    name = f"{kind}_{layer}_prefix_{number}"
                    torch.testing.assert_close(actual.prefix_tokens[place, 0], expected[name], atol=2e-5, rtol=0)
                    compared.add(name)
    assert compared == expected.keys()


@torch.no_grad()
def test_merged_tokens_are_those_of_timms_encoder_alone_and_in_a_classifier(copy):
    folder = copy("timm-qwen3")
    expected = load_file(folder / "expected.safetensors")
    images = load_file(folder / "inputs.safetensors")
    state = load_file(folder / "model.safetensors")
    pixels = [images[f"image_{number}"][0] for number in range(3)]
    for prefix, more in (("", {}), ("encoder.", {"head.weight": torch.zeros(5, 16), "head.bias": torch.zeros(5)})):
        save_file({f"{prefix}{name}": tensor for name, tensor in state.items()} | more, folder / "model.safetensors")
        encoder = nopad.load(folder)
        pack = nopad.Pack.of(pixels, 4, encoder.patch_order)
        for number, merged in enumerate(encoder.encode(pack).merged.split(pack.lengths(2))):
            torch.testing.assert_close(merged, expected[f"merged_{number}"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_saved_they_load_into_transformers_models(goldens, tmp_path, case):
    encoder = nopad.load(goldens / case)
    encoder.save_pretrained(tmp_path)
    again = nopad.load(tmp_path)
    assert again.dialect == ("Meta" if "tips" in case or "pe-" in case else "transformers")
    for mine, theirs in zip(
        tokens_of(again, goldens / case, 1)[1:], tokens_of(encoder, goldens / case, 1)[1:], strict=True
    ):
        assert all(map(torch.equal, mine, theirs))
    assert again.preprocessor_config == encoder.preprocessor_config
    if encoder.family != "pe":  # which has no reference
        assert align(goldens / case).passed


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_needed(copy, case):
    folder = copy(case)
    state = load_file(folder / "model.safetensors")
    for name in state:
        save_file({other: tensor for other, tensor in state.items() if other != name}, folder / "model.safetensors")
        if name == "reg_token" and CASES[case] == "dinov3":  # timm's models without registers have none
            assert nopad.load(folder).num_prefix_tokens == 1
            continue
        message = "architecture: expected" if (case, name) == ("timm-vit", "cls_token") else name  # SigLIP has none
        with pytest.raises(ValueError, match=rf"{folder}.*{message}|unknown family"):
            nopad.load(folder)
    save_file({**state, "surprise": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="1 unexpected: surprise"):
        nopad.load(folder)


@pytest.mark.parametrize("case", CASES)
def test_a_classifier_is_left_out(copy, case):
    folder = copy(case)
    state = load_file(folder / "model.safetensors")
    expected = nopad.load(folder).state_dict()
    save_file({**state, "head.weight": torch.zeros(9, 32), "head.bias": torch.zeros(9)}, folder / "model.safetensors")
    loaded = nopad.load(folder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_heads_are_those_of_the_architecture_unless_changed(copy, goldens):
    expected = load_file(goldens / "timm-aimv2" / "expected.safetensors")["tokens_0"]
    folder = copy("timm-aimv2")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"].pop("num_heads") == 4
    (folder / "config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    assert encoder.config.num_attention_heads == 8  # as in timm, whatever the width
    assert not torch.allclose(tokens_of(encoder, folder, 1)[1][0], expected, atol=1e-2)


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("timm-aimv2", {"class_token": True}, "class_token: expected False, got True"),
        ("timm-aimv2", {"norm_layer": "layernorm"}, "not implemented: norm_layer"),
        (
            "timm-aimv2",
            {"act_layer": "mish"},
            "act_layer: expected one of gelu, gelu_tanh, quick_gelu, .* got 'mish'",
        ),
        ("timm-aimv2", {"num_heads": 3}, "num_attention_heads: expected a divisor of hidden_size 32, got 3"),
        ("timm-aimv2", {"num_heads": "4"}, "num_attention_heads"),
        ("timm-dinov2", {"no_embed_class": True}, "no_embed_class: expected False, got True"),
        ("timm-dinov2-registers", {"no_embed_class": False}, "no_embed_class: expected True, got False"),
        ("timm-dinov3", {"rope_type": "cat"}, "rope_type: expected 'dinov3', got 'cat'"),
        ("timm-dinov3", {"rope_grid_offset": 0.5}, "rope_grid_offset: expected 0.0, got 0.5"),
        ("timm-dinov3", {"qk_norm": True}, "qk_norm: expected False, got True"),
        ("timm-siglip", {"fc_norm": True}, "fc_norm: expected False, got True"),
        ("timm-siglip", {"mistyped": 1}, "not implemented: mistyped"),
        ("timm-clip", {"pre_norm": False}, "pre_norm: expected True, got False"),
        ("timm-clip", {"mistyped": 1}, "not implemented: mistyped"),
        ("timm-naflexvit", {"pos_embed_interp_mode": "bicubic"}, "pos_embed_interp_mode: expected 'bilinear', got"),
        ("timm-naflexvit", {"pos_embed_ar_preserving": True}, "pos_embed_ar_preserving: expected False, got True"),
        ("timm-qwen3", {"encoder_pool": "avg"}, "encoder_pool: expected 'merge', got 'avg'"),
        ("timm-qwen3", {"merge_size": 1}, "misshapen: merger.fc1.bias"),
        ("timm-qwen3", {"num_heads": 16}, "head size: expected a multiple of 4"),
        ("timm-vit", {"pre_norm": True}, "pre_norm: expected False, got True"),
        ("timm-vit", {"no_embed_class": True}, "no_embed_class: expected False, got True"),
        ("timm-naflexvit", {"rope_type": "axial"}, "rope_type: expected '', got 'axial'"),
    ],
)
def test_arguments_that_nothing_implements_are_refused(copy, case, changes, expected):
    folder = copy(case, **changes)
    with pytest.raises(ValueError, match=rf"{folder}.*{expected}"):
        nopad.load(folder)


@pytest.mark.parametrize(
    ("case", "changes", "name", "value"),
    [
        ("timm-siglip", {"act_layer": "gelu_tanh"}, "hidden_act", "gelu_pytorch_tanh"),
        ("timm-siglip", {}, "hidden_act", "gelu"),
        ("timm-clip", {}, "hidden_act", "gelu"),
        ("timm-clip", {"act_layer": "quick_gelu"}, "hidden_act", "quick_gelu"),
        ("timm-dinov3", {"attn_drop_rate": 0.25}, "attention_dropout", 0.25),
        ("timm-dinov3", {"rope_temperature": 40.0}, "rope_theta", 40.0),
        ("timm-qwen3", {"rope_temperature": 40.0}, "rope_parameters", {"rope_type": "axial", "rope_theta": 40.0}),
        ("timm-qwen3", {"act_layer": "gelu"}, "hidden_act", "gelu"),
        ("timm-vit", {}, "layer_norm_eps", 1e-6),
        ("timm-vit", {"act_layer": "quick_gelu"}, "hidden_act", "quick_gelu"),
        ("timm-naflexvit", {"attn_drop_rate": 0.25}, "attention_dropout", 0.25),
        ("timm-pe-core", {"attn_drop_rate": 0.25}, "attention_dropout", 0.25),
        ("timm-pe-core", {"rope_temperature": 40.0}, "rope_theta", 40.0),
        ("timm-pe-core", {"rope_grid_offset": 2.0}, "rope_offset", 2.0),
    ],
)
def test_arguments_are_read(copy, case, changes, name, value):
    assert getattr(nopad.load(copy(case, **changes)).config, name) == value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["vit_base_patch16_rpn_224", "eva02_base_patch14_224", 5, ""])
def test_other_architectures_are_refused(copy, case, architecture):
    folder = copy(case)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architecture": architecture}))
    if architecture == "" and CASES[case] == "aimv2":  # whose tensors and `model_args` say all
        nopad.load(folder)
        return
    with pytest.raises(ValueError, match=rf"{folder}.*architecture: expected "):
        nopad.load(folder)


@pytest.mark.parametrize("case", [case for case, family in CASES.items() if family != "aimv2"])
def test_without_a_config_they_are_refused(copy, case):
    folder = copy(case)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=rf"{folder}.*config.json"):
        nopad.load(folder)


NET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CUBIC_HALF = {"resample": "bicubic", **HALF}


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("timm-dinov3", {}, {"rule": "crop", "size": 256, "resample": "bicubic", **NET}),
        ("timm-dinov3", {"crop_mode": "squash"}, {"rule": "square", "size": 256, "resample": "bicubic", **NET}),
        ("timm-dinov3", {"interpolation": "bilinear"}, {"rule": "crop", "size": 256, "resample": "bilinear", **NET}),
        ("timm-siglip", {}, {"rule": "crop", "size": 20, "short_side": 22, **CUBIC_HALF}),
        ("timm-siglip", {"crop_pct": None}, {"rule": "crop", "size": 20, "short_side": 22, **CUBIC_HALF}),
        ("timm-siglip", {"crop_pct": 1.0}, {"rule": "crop", "size": 20, **CUBIC_HALF}),
        ("timm-qwen3", {}, {"rule": "square", "size": 768, "multiple_of": 2, **CUBIC_HALF}),
        ("timm-naflexvit", {}, {"rule": "naflex", "max_patches": 256, **CUBIC_HALF}),
    ],
)  # fmt: skip
def test_images_are_made_as_the_config_says(copy, case, changes, expected):
    folder = copy(case)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    older = {name: value for name, value in config.items() if name != "pretrained_cfg"} | config["pretrained_cfg"]
    for fields in (config, older):
        (folder / "config.json").write_text(json.dumps(fields))
        assert nopad.load(folder).preprocessing == Preprocessing(**expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"crop_pct": 0.9, "crop_mode": "squash"}, "got {'crop_pct': 0.9, 'crop_mode': 'squash'}, steps that no"),
        ({"crop_pct": 1.1}, "expected no resize"),
        ({"crop_pct": "a"}, "got {'crop_pct': 'a', 'crop_mode': 'center'}, steps that no rule"),
        ({"crop_pct": -1}, "got {'crop_pct': -1, 'crop_mode': 'center'}, steps that no rule"),
        ({"crop_pct": 1.0, "crop_mode": "border"}, "got {'crop_pct': 1.0, 'crop_mode': 'border'}, steps that no rule"),
        ({"crop_pct": 1.0, "interpolation": "random"}, "resample: expected 2"),
        ({"crop_pct": 1.0, "interpolation": ["bicubic"]}, "resample: expected 2"),
        ({"crop_pct": 1.0, "input_size": [3, 20, 24]}, "size: expected pixels"),
        ({"crop_pct": 1.0, "input_size": [3, "a", "a"]}, "size: expected pixels"),
    ],
)
def test_images_that_no_rule_makes_are_refused(copy, changes, expected):
    folder = copy("timm-siglip")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    encoder = nopad.load(folder)
    with pytest.raises(ValueError, match=rf"{folder}.*{expected}"):
        encoder.pack([torch.zeros(3, 20, 20, dtype=torch.uint8)])


def test_satellite_statistics_are_those_of_the_config(copy, caplog):
    folder = copy("timm-dinov3")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.430, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
    (folder / "config.json").write_text(json.dumps(config))
    assert nopad.load(folder).preprocessing.mean == (0.430, 0.411, 0.296)
    assert not caplog.messages

"""The fields of `config.json`: each is read, has the one value that is implemented, or is told."""

import json
import shutil

import numpy as np
import pytest
import torch
from dinov3_checkpoints import meta, save, save_meta, tiny_original
from tiny_encoders import FAMILIES, tiny
from transformers import PreTrainedConfig
from transformers.models.aimv2.configuration_aimv2 import Aimv2VisionConfig
from transformers.models.dinov3_vit.configuration_dinov3_vit import DINOv3ViTConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

import nopad
from nopad.families.dinov3 import STATISTICS, DINOv3ViTPacking

IMAGENET, SATELLITE = STATISTICS["imagenet"]["mean"], STATISTICS["sat493m"]["mean"]


def changed(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_that_nothing_reads_are_logged_once(tmp_path, family, caplog):
    folder = changed(tiny(family, tmp_path / family), surprise=0.5, architectures=["A"], top_k=50, _name_or_path="a")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    nopad.load(folder)
    nopad.load(folder)
    (message,) = caplog.messages
    assert message == f"checkpoint {str(folder)!r}: fields of config.json that are not read: surprise=0.5"


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_of_the_originals_are_read_without_a_word(tmp_path, family, caplog):
    folder = tiny(family, tmp_path / family)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    encoder = nopad.load(folder)
    encoder.save_pretrained(tmp_path / "saved")
    nopad.load(tmp_path / "saved")
    assert not caplog.messages


@pytest.mark.parametrize(
    ("family", "config_class"),
    [
        ("aimv2", Aimv2VisionConfig),
        ("siglip2", Siglip2VisionConfig),
        ("siglip", SiglipVisionConfig),
        ("dinov3", DINOv3ViTConfig),
    ],
)
def test_every_field_of_transformers_config_is_known(tmp_path, family, config_class, caplog):
    """A field that a later transformers adds makes this test fail: read it, or refuse its other values."""
    names = config_class().to_dict().keys() - PreTrainedConfig().to_dict().keys()
    folder = tiny(family, tmp_path / family)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    written = json.loads((folder / "config.json").read_text())
    changed(
        folder, **{name: value for name, value in config_class().to_dict().items() if name in names - written.keys()}
    )
    nopad.load(folder)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("aimv2", {"projection_dropout": 0.1}, "projection_dropout: expected 0.0, .* got 0.1"),
        ("aimv2", {"pruned_heads": {"0": [1]}}, r"pruned_heads: expected \{\}, .* got \{'0'"),
        ("dinov3", {"rope_scaling": {"type": "linear"}}, "rope_scaling: expected None, .* got {'type'"),
        ("onevision", {"rope_parameters": {"rope_theta": 5}}, "rope_parameters: expected None, .* got"),
    ],
)
def test_values_that_nothing_implements_are_refused(tmp_path, family, changes, expected):
    folder = changed(tiny(family, tmp_path / family), **changes)
    with pytest.raises(ValueError, match=rf"{folder}.*{expected}"):
        nopad.load(folder)


def test_a_part_for_the_vision_encoder_is_read_by_every_family(tmp_path):
    for family, name in (("dinov3", "layer_norm_eps"), ("onevision", "layer_norm_eps"), ("aimv2", "rms_norm_eps")):
        folder = changed(tiny(family, tmp_path / family), **{name: 0.25})
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"vision_config": content}))
        assert getattr(nopad.load(folder).config, name) == 0.25


def test_a_config_beside_metas_file_is_read(tmp_path):
    original = tiny_original()
    folder = save_meta(tmp_path / "model.pth", meta(original)).parent
    (folder / "config.json").write_text(json.dumps({**original.config.to_dict(), "layer_norm_eps": 0.25}))
    assert nopad.load(folder).config.layer_norm_eps == 0.25
    changed(folder, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"config\.json says \{'num_attention_heads': 2\}, but its tensors \{'num_a"):
        nopad.load(folder)


def test_gated_layers_without_an_activation_are_those_of_the_published_models(tmp_path):
    original = tiny_original(use_gated_mlp=True, hidden_act="silu")
    folder = save(tmp_path, original)
    content = json.loads((folder / "config.json").read_text())
    content["model_type"] = "my_own"
    del content["hidden_act"]
    (folder / "config.json").write_text(json.dumps(content))
    assert nopad.load(folder).config.hidden_act == "silu"
    changed(folder, model_type="dinov3_vit")  # transformers' own, which leaves its defaults out
    assert nopad.load(folder).config.hidden_act == "gelu"


@pytest.fixture
def satellite(goldens, tmp_path):
    folder = tmp_path / "dinov3_vitl16_pretrain_sat493m"
    folder.mkdir()
    shutil.copy(goldens / "dinov3-meta" / "model.pth", folder)
    return folder


def test_statistics_do_not_depend_on_how_a_path_is_spelled(satellite, monkeypatch, caplog):
    monkeypatch.chdir(satellite)
    images = [np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)]
    features = []
    for name in (satellite, satellite / "model.pth", ".", f"{satellite}/", f"{satellite}/../{satellite.name}"):
        encoder = nopad.load(name)
        assert encoder.preprocessing.mean == IMAGENET
        assert "nothing says which pixel statistics it was trained with" in caplog.messages[-1]
        features.append(encoder.embed(images))
    assert all(torch.equal(features[0], other) for other in features)


def test_statistics_of_the_config_are_used_without_a_warning(satellite, tmp_path, caplog):
    encoder = DINOv3ViTPacking.from_pretrained(satellite, pixel_statistics="sat493m")
    assert encoder.preprocessing.mean == SATELLITE
    caplog.clear()
    encoder.save_pretrained(tmp_path / "saved")
    assert nopad.load(tmp_path / "saved").preprocessing.mean == SATELLITE
    (satellite / "preprocessor_config.json").write_text(json.dumps({"image_mean": list(SATELLITE)}))
    assert nopad.load(satellite).preprocessing.mean == SATELLITE
    assert not [message for message in caplog.messages if "statistics" in message]


def test_what_is_unknown_stays_unknown_when_it_is_saved(tmp_path, caplog):
    nopad.load(save(tmp_path / "first", tiny_original())).save_pretrained(tmp_path / "saved")
    encoder = nopad.load(tmp_path / "saved")
    assert encoder.config.pixel_statistics is None
    assert not caplog.messages  # to who makes pixels otherwise nothing is said
    assert encoder.preprocessing.mean == IMAGENET
    assert "nothing says which pixel statistics" in caplog.messages[-1]


def test_published_architectures_know_their_statistics(caplog):
    name = "untrained:facebook/dinov3-vitl16-pretrain-sat493m"
    config = DINOv3ViTPacking.published_config(name.removeprefix("untrained:"))
    with torch.device("meta"):
        assert DINOv3ViTPacking(config).preprocessing.mean == SATELLITE
    assert not caplog.messages

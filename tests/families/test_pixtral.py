"""Pixtral: parity with transformers over random architectures, Mistral's files, the towers, and the preprocessing."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import vlm_checkpoints
from aimv2_checkpoints import write
from image_samples import PHOTOS, noise
from originals import assert_parity
from PIL import Image
from pixtral_checkpoints import mistral, save, tiny_original, write_consolidated
from preprocessor_configs import assert_preprocessing
from safetensors.torch import load_file
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import nopad
from nopad.preprocessing.decode import load_image
from nopad.preprocessing.transforms import preprocess


@pytest.mark.parametrize("seed", range(6))
def test_random_architectures_equal_the_original(tmp_path, seed):
    draw = random.Random(seed)
    heads, size = draw.choice([1, 2, 3, 4]), draw.choice([4, 8, 12, 64, 104])
    changes = {
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([20, 48, 96]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "patch_size": draw.choice([3, 4, 7]),
        "hidden_act": draw.choice(["silu", "gelu"]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": draw.choice([100.0, 10_000.0])},
    }
    original = tiny_original(**changes)
    grids = [(1, 1, 1), (1, 1, 60), (1, 60, 1), (2, 3, 5)] + [(1, draw.randint(1, 9), draw.randint(1, 9))] * 2
    assert_parity("pixtral", nopad.load(save(tmp_path, original)), original, grids)


@pytest.mark.parametrize("layout", [dict, mistral])
def test_files_without_a_config_have_the_published_heads(tmp_path, layout):
    original = tiny_original()
    write(tmp_path, layout(original.state_dict()), None)
    assert_parity("pixtral", nopad.load(tmp_path / "model.safetensors"), original)


def test_consolidated_file_of_a_whole_model_and_its_params(tmp_path):
    theta = {"rope_type": "axial", "rope_theta": 500.0}
    original = tiny_original(rope_parameters=theta, image_size=40)
    encoder = nopad.load(write_consolidated(tmp_path / "whole", original, spatial_merge_size=2))
    assert (encoder.dialect, encoder.tower_prefix) == ("Mistral", "vision_encoder.")
    assert (encoder.preprocessing.size, encoder.preprocessing.multiple_of) == (40, 2)
    assert_parity("pixtral", encoder, original)
    encoder.save_into(tmp_path / "whole", tmp_path / "same")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    encoder.save_pretrained(tmp_path / "alone")
    assert load_file(tmp_path / "alone" / "model.safetensors").keys() == original.state_dict().keys()
    again = nopad.load(tmp_path / "alone")
    assert again.preprocessing == encoder.preprocessing
    assert_parity("pixtral", again, original)


def test_shards_of_a_consolidated_file(tmp_path):
    folder = write_consolidated(tmp_path, tiny_original())
    shard = "consolidated-00001-of-00001.safetensors"
    (folder / "consolidated.safetensors").rename(folder / shard)
    index = {"weight_map": dict.fromkeys(load_file(folder / shard), shard)}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert_parity("pixtral", nopad.load(folder), tiny_original())


def test_other_heads_under_mistrals_names_are_refused(tmp_path):
    original = tiny_original(num_attention_heads=4)
    write(tmp_path, mistral(original.state_dict()), original.config.to_dict())
    with pytest.raises(ValueError, match=r"num_attention_heads: expected 16 .* Mistral's names, got 4"):
        nopad.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"head_dim": 16}, "head_dim: expected hidden_size / num_attention_heads, got 16"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: expected rope_type 'axial'"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4, "factor": 2}}, "rope_parameters: expected"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters: expected .* above 0, got {'rope_theta': 0,"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters: expected .* got {'rope_theta': '1e4'"),
        ({"rope_parameters": "axial"}, "rope_parameters: expected .* got 'axial'"),
        ({"num_attention_heads": 64}, "head size: expected a multiple of 4 for rope over two axes, got 2"),
        ({"image_multiple": 0}, "spatial_merge_size: expected an integer ≥ 1, got 0"),
        ({"patch_size": [4, 5]}, "patch_size: expected one number or two that are equal"),
        ({"model_type": "siglip_vision_model"}, "expected model_type pixtral"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_is_refused(tmp_path, fields, problem):
    original = tiny_original()
    config = {**original.config.to_dict(), **fields}
    config = {**config, "head_dim": fields.get("head_dim")}
    with pytest.raises(ValueError, match=problem):
        nopad.load(write(tmp_path, original.state_dict(), config))


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 100.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}]
)
def test_rope_of_older_configs(tmp_path, rope):
    original = tiny_original(rope_parameters={"rope_type": "axial", "rope_theta": 100.0})
    config = {name: value for name, value in original.config.to_dict().items() if name != "rope_parameters"}
    assert_parity("pixtral", nopad.load(write(tmp_path, original.state_dict(), {**config, **rope})), original)


@pytest.mark.parametrize("model_type", ["mistral3", "lighton_ocr"])
def test_towers_have_images_of_the_blocks_that_their_model_merges(tmp_path, model_type):
    vlm_checkpoints.save(tmp_path, model_type)
    rule = {"image_processor_type": "PixtralImageProcessorFast", "size": {"longest_edge": 40}, "do_pad": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**rule, "patch_size": {"height": 16, "width": 16}}))
    preprocessing = nopad.load(tmp_path).preprocessing
    assert (preprocessing.rule, preprocessing.size, preprocessing.multiple_of) == ("longest_edge", 40, 2)


# Preprocessing

SHAPES = [(300, 451), (451, 300), (97, 1000), (1, 1), (2, 150), (1540, 1541), (28, 28), (3, 2000)]
SUBJECTS = [*PHOTOS, *SHAPES]


def subject(which):
    """A photo or noise of a shape, as nopad loads it and as a processor takes it."""
    if isinstance(which, tuple):
        image = noise(*which)
        return image, Image.fromarray(image.permute(1, 2, 0).numpy())
    return load_image(which), Image.open(which).convert("RGB")


@pytest.mark.parametrize("which", SUBJECTS, ids=str)
@pytest.mark.parametrize("name", ["mistral-community/pixtral-12b", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"])
def test_rule_equals_the_processor_bit_for_bit(name, which):
    """PixtralProcessor calls it with the patches of the model times the blocks that are merged."""
    config = nopad.PixtralPacking.published_config(name)
    rule = nopad.PixtralPacking.published_preprocessing(config)
    image, picture = subject(which)
    processor = PixtralImageProcessorPil(size={"longest_edge": config.image_size})
    expected = processor(picture, patch_size=config.patch_size * config.image_multiple, return_tensors="pt")
    pixels = preprocess(image, rule, config.patch_size, resize="pil")
    assert torch.equal(pixels, expected["pixel_values"][0])
    assert pixels[0].numel() <= rule.max_pixels(config.patch_size)


def test_side_that_the_processor_scales_to_nothing_is_one_patch():
    rule = nopad.PixtralPacking.published_preprocessing(
        nopad.PixtralPacking.published_config("mistral-community/pixtral-12b")
    )
    assert preprocess(noise(1, 3000), rule, 16).shape == (3, 16, 1024)
    with pytest.raises(ValueError, match="height=0, width=1024"):
        PixtralImageProcessorPil()(Image.fromarray(np.zeros((1, 3000, 3), np.uint8)))


def test_limit_on_patches_scales_down():
    rule = nopad.PixtralPacking.published_preprocessing(
        nopad.PixtralPacking.published_config("mistral-community/pixtral-12b")
    )
    place = rule.with_size(max_patches=256).place(3000, 1500, 16)
    assert place.num_patches <= 256 < rule.place(3000, 1500, 16).num_patches


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("longest_edge", 20)),
        ({"size": {"longest_edge": 99, "height": None}}, ("longest_edge", 99)),
        ({"size": {"height": 99, "width": 99}}, ("longest_edge", 99)),
        ({"size": 99}, ("longest_edge", 99)),
        ({"image_processor_type": "PixtralImageProcessor"}, ("longest_edge", 1024)),
        ({"do_resize": False}, ("native", None)),
        ({"size": {"shortest_edge": 99}}, r"size: expected \{'longest_edge': n\}"),
        ({"size": {"height": 99, "width": 98}}, r"size: expected \{'longest_edge': n\}"),
        ({"do_center_crop": True}, "do_center_crop: expected false"),
    ],
    ids=str,
)
def test_preprocessor_config(tmp_path, config, expected):
    assert_preprocessing(save(tmp_path, tiny_original()), config, expected)


PARAMETERS = {"mistral-community/pixtral-12b": 403_489_792}


def test_published_models_have_their_published_sizes():
    published = nopad.PixtralPacking.published
    for name in published:
        with torch.device("meta"):
            model = nopad.PixtralPacking(nopad.PixtralPacking.published_config(name))
        assert name not in PARAMETERS or model.num_parameters() == PARAMETERS[name]
    assert len(published) == 7

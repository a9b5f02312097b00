"""MoonViT: parity with transformers over random architectures and clips, Moonshot's files, and the preprocessing."""

from __future__ import annotations

import math
import random

import pytest
import torch
from aimv2_checkpoints import write
from image_samples import noise
from moonvit_checkpoints import moonshot, run, save, tiny_original
from originals import assert_parity, max_relative, pixels_of
from preprocessor_configs import assert_preprocessing
from torch.nn import functional

import nopad
from nopad.preprocessing.transforms import preprocess


@pytest.mark.parametrize("seed", range(6))
def test_random_architectures_equal_the_original(tmp_path, seed):
    draw = random.Random(seed)
    heads, size = draw.choice([1, 2, 3, 4]), draw.choice([4, 8, 12, 72])
    side, frames = draw.choice([3, 5, 8]), draw.choice([3, 4, 9])
    changes = {
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([20, 48, 96]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "patch_size": draw.choice([3, 4, 7]),
        "pos_emb_height": side,
        "pos_emb_width": side,
        "pos_emb_time": frames,
        "hidden_act": draw.choice(["gelu", "gelu_pytorch_tanh"]),
        "rope_parameters": {"rope_type": "axial", "rope_theta": draw.choice([100.0, 10_000.0])},
    }
    original = tiny_original(**changes)
    grids = [(1, 1, 1), (1, 1, 60), (1, 60, 1), (frames, 3, 5), (2, 1, 1), (1, draw.randint(1, 9), draw.randint(1, 9))]
    assert_parity("moonvit", nopad.load(save(tmp_path, original)), original, grids)


@torch.no_grad()
def test_clips_of_more_frames_than_positions_are_refused(tmp_path):
    encoder = nopad.load(save(tmp_path, tiny_original()))
    with pytest.raises(ValueError, match=r"grid_thw: expected clips of at most 4 frames.* got 5"):
        encoder(nopad.Pack.of(pixels_of([(5, 1, 1)]), 4, encoder.patch_order))


@pytest.mark.parametrize("layout", [dict, moonshot])
def test_files_without_a_config_have_the_published_heads(tmp_path, layout):
    original = tiny_original()
    write(tmp_path, layout(original.state_dict()), None)
    assert_parity("moonvit", nopad.load(tmp_path / "model.safetensors"), original)


def test_moonshots_own_config(tmp_path):
    original = tiny_original(merge_kernel_size=[2, 2])
    config = {
        "model_type": "kimi_k25",
        "vision_config": {
            **{
                f"init_pos_emb_{axis}": getattr(original.config, f"pos_emb_{axis}")
                for axis in ("height", "width", "time")
            },
            **{
                f"vt_{name}": getattr(original.config, name)
                for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            },
            "patch_size": 4,
            "merge_kernel_size": [2, 2],
            "merge_type": "sd2_tpool",
            "mm_hidden_size": 128,
            "projector_ln_eps": 1e-5,
        },
    }
    state = {f"vision_tower.{name}": tensor for name, tensor in moonshot(original.state_dict()).items()}
    folder = write(tmp_path, {**state, "mm_projector.proj.0.weight": torch.ones(2, 2)}, config)
    encoder = nopad.load(folder)
    assert (encoder.dialect, encoder.preprocessing.multiple_of) == ("Moonshot", 2)
    pixels = pixels_of([(1, 4, 6), (2, 2, 4)])
    with torch.no_grad():
        pack = nopad.Pack.of(pixels, 4, encoder.patch_order)
        for tokens, image in zip(pack.unpack(encoder(pack)), pixels, strict=True):
            assert max_relative(tokens.flatten(0, 2), run(original, image)) < 1e-4
    config["vision_config"]["merge_type"] = "other"
    with pytest.raises(ValueError, match=r"merge_type: expected 'sd2_tpool'"):
        nopad.load(write(tmp_path, {**state}, config))


@pytest.mark.parametrize(
    ("layout", "fields", "problem"),
    [
        (moonshot, {"num_attention_heads": 4}, r"num_attention_heads: expected 16 .* Moonshot's names, got 4"),
        (dict, {"num_attention_heads": 64}, "head size: expected a multiple of 4 for rope over two axes, got 2"),
        (dict, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters: expected rope_type"),
        (dict, {"merge_kernel_size": [2, 3]}, r"merge_kernel_size: expected two equal integers ≥ 1, got \[2, 3\]"),
        (dict, {"pos_emb_time": 0}, "pos_emb_time: expected an integer ≥ 1, got 0"),
        (dict, {"positions": "strict"}, "positions: these checkpoints resample theirs"),
        (dict, {"model_type": "siglip_vision_model"}, "expected model_type kimi_k25"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_config_that_does_not_fit_is_refused(tmp_path, layout, fields, problem):
    original = tiny_original()
    with pytest.raises(ValueError, match=problem):
        nopad.load(write(tmp_path, layout(original.state_dict()), {**original.config.to_dict(), **fields}))


# Preprocessing


def processed(image, patch_size, merge_size, max_patches, max_side):
    """The documented arithmetic of Kimi_K25ImageProcessor, which cannot be imported without torchvision."""
    _, height, width = image.shape
    patches = max(1.0, height // patch_size) * max(1.0, width // patch_size)
    scale = min(1.0, math.sqrt(max_patches / patches), max_side * patch_size / height, max_side * patch_size / width)
    new = [min(max(1, int(side * scale)), max_side * patch_size) for side in (height, width)]
    if new != [height, width]:
        image = functional.interpolate(image[None], new, mode="bicubic", antialias=True)[0]
    unit = merge_size * patch_size
    image = functional.pad(image, (0, -new[1] % unit, 0, -new[0] % unit))
    return (image.float() - 127.5) / 127.5


@pytest.mark.parametrize("limits", [(16384, 512), (64, 10), (20, 4)], ids=str)
@pytest.mark.parametrize("shape", [(300, 451), (224, 224), (64, 65), (97, 500), (1, 1), (2, 150), (28, 28)], ids=str)
def test_rule_equals_the_steps_of_the_processor(shape, limits):
    config = nopad.MoonViTPacking.published_config("moonshotai/Kimi-K2.5")
    published = nopad.MoonViTPacking.published_preprocessing(config)
    assert published.size == (16384, 512)
    rule = type(published)(**{**vars(published), "size": limits})
    image = noise(*shape)
    pixels = preprocess(image, rule, config.patch_size)
    expected = processed(image, config.patch_size, 2, *limits)
    assert pixels.shape == expected.shape
    assert pixels[0].numel() <= rule.max_pixels(config.patch_size)
    assert (pixels - expected).abs().max() <= 2 / 127.5  # torch's passes in another order where rows shrink more
    if shape[0] <= limits[1] * 14 and limits == (16384, 512):
        assert (pixels - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("navit", (16384, 512))),
        ({"image_processor_type": "Kimi_K25ImageProcessor"}, ("navit", (16384, 512))),
        ({"size": {"max_height": 9, "max_width": 9}, "max_patches": 40}, ("navit", (40, 9))),
        ({"do_resize": False}, ("native", None)),
        ({"size": {"max_height": 9, "max_width": 8}}, "size: expected equal max_height and max_width"),
        ({"size": {"height": 9, "width": 9}}, "size: expected equal max_height and max_width"),
        ({"max_patches": "many"}, r"size: expected \(most, most of a side\) in patches"),
    ],
    ids=str,
)
def test_preprocessor_config(tmp_path, config, expected):
    assert_preprocessing(save(tmp_path, tiny_original()), config, expected)


def test_limit_on_patches_is_refused(tmp_path):
    rule = nopad.load(save(tmp_path, tiny_original())).preprocessing
    with pytest.raises(ValueError, match=r"max_patches: expected None for 'navit', which has its own limit"):
        rule.with_size(max_patches=64)
    assert rule.with_size("native", max_patches=64).rule == "native"
    assert rule.describe().startswith("navit 16384 patches, a side 512;")


def test_published_models_have_the_parameters_of_so400m():
    published = nopad.MoonViTPacking.published
    for name in published:
        with torch.device("meta"):
            model = nopad.MoonViTPacking(nopad.MoonViTPacking.published_config(name))
        assert model.num_parameters() == 416_866_032
    assert len(published) == 2

"""DINOv2: goldens of Meta's code, parity with transformers for all variants, and what a checkpoint may leave out.

TIPSv2: what it has other than DINOv2.
"""

from __future__ import annotations

import json

import pytest
import torch
from aimv2_checkpoints import randomize, write
from dinov2_checkpoints import GATED, VARIANTS, in_memory, meta, published, save, tiny_original, tiny_tipsv2, tipsv2
from originals import assert_parity, pixels_of
from safetensors.torch import load_file
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionModel

import nopad
from model_factory import vit_dinov2_packing_hf as spec
from nopad.align.references.dinov2 import DINOv2Reference
from nopad.align.run import align
from nopad.families.dinov2 import TIPSv2Packing
from nopad.families.dinov2_checkpoints import (
    DINOv2PackingConfig,
    DINOv2WithRegistersPackingConfig,
    TIPSv2PackingConfig,
)
from nopad.families.sizes import swiglu_size
from nopad.preprocessing.rules import Preprocessing

OF_META = {name: VARIANTS[name] for name in ("plain", "gated", "registers", "gated, registers")}
HEADS_OF_64 = {"hidden_size": 128, "num_attention_heads": 2}  # which files without config have


def save_meta(path, original):
    torch.save(meta(original), path)
    return path


@pytest.mark.parametrize("folder", ["dinov2-meta", "dinov2-meta-registers-swiglu"])
@pytest.mark.parametrize("backwards", [False, True])
def test_goldens_of_metas_own_code(goldens, folder, backwards):
    inputs = load_file(goldens / folder / "inputs.safetensors")
    expected = load_file(goldens / folder / "expected.safetensors")
    numbers = sorted((name.removeprefix("image_") for name in inputs), reverse=backwards)
    encoder = nopad.load(goldens / folder)
    assert (encoder.family, encoder.dialect) == ("dinov2", "Meta")
    pack = nopad.Pack.of([inputs[f"image_{i}"][0] for i in numbers], encoder.patch_size, encoder.patch_order)
    with torch.no_grad():
        output = encoder.encode(pack)
    for i, tokens, pooled, prefix in zip(
        numbers, pack.unpack(output.tokens), output.pooled, output.prefix_tokens, strict=True
    ):
        assert (tokens.flatten(0, 2) - expected[f"tokens_{i}"]).abs().max() <= 2e-5
        assert (pooled - expected[f"pooled_{i}"]).abs().max() <= 2e-5
        if f"registers_{i}" in expected:
            assert (prefix[1:] - expected[f"registers_{i}"]).abs().max() <= 2e-5


def assert_saved_as_the_original(encoder, original, folder):
    encoder.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == published(original).keys()  # which every version of transformers reads
    reloaded, info = type(original).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in original.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name
    assert_parity("dinov2", nopad.load(folder), reloaded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dialect", [published, in_memory])
def test_transformers_names_are_loaded_and_saved(tmp_path, dialect, variant):
    original = tiny_original(**VARIANTS[variant])
    encoder = nopad.load(save(tmp_path / "in", original, dialect))
    assert encoder.num_parameters() == original.num_parameters()
    assert encoder.config.model_type == original.config.model_type
    assert_parity("dinov2", encoder, original, tolerance=1e-5)
    assert_saved_as_the_original(encoder, original, tmp_path / "out")


@pytest.mark.parametrize("variant", OF_META)
def test_metas_names_are_loaded_and_saved_for_transformers(tmp_path, variant):
    original = tiny_original(**OF_META[variant], **HEADS_OF_64)
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", original))
    assert encoder.dialect == "Meta"
    assert_parity("dinov2", encoder, original, tolerance=1e-5)
    assert_saved_as_the_original(encoder, original, tmp_path / "out")


@pytest.mark.parametrize("changes", [{}, GATED])
def test_names_in_memory_are_saved_on_request(tmp_path, changes):
    original = tiny_original(**changes)
    encoder = nopad.load(save(tmp_path / "in", original))
    encoder.save_pretrained(tmp_path / "out", save_original_format=False)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == in_memory(original).keys()
    assert nopad.load(tmp_path / "out").dialect == "transformers, in memory"


@pytest.mark.parametrize("changes", [{}, {"num_register_tokens": 2}])
def test_alignment_of_a_meta_file(tmp_path, changes):
    report = align(save_meta(tmp_path / "weights.pth", tiny_original(**changes, **HEADS_OF_64)))
    assert report.passed, [case.failures for case in report.cases]
    assert report.weights == "Meta names, converted by nopad to transformers names"


@pytest.mark.parametrize("dialect", [published, in_memory, meta])
@pytest.mark.parametrize("changes", [{"num_register_tokens": 2}, {**GATED, "num_register_tokens": 2}])
def test_older_references_get_the_names_of_files(tmp_path, monkeypatch, changes, dialect):
    """As before transformers 5.18, in which the class has these in memory too."""
    original, loaded = tiny_original(**changes, **HEADS_OF_64), {}

    def load(self, packed, state, dtype):
        loaded.update(state)
        self.num_prefix_tokens = packed.num_prefix_tokens
        return original

    monkeypatch.setattr(DINOv2Reference, "names", lambda self, packed: {*published(original)})
    monkeypatch.setattr(DINOv2Reference, "load", load)
    assert align(save(tmp_path, original, dialect)).passed
    torch.testing.assert_close(loaded, published(original), rtol=0, atol=0)


def test_antialiasing_comes_with_registers(tmp_path):
    """Downsampled positions tell: the class without registers does not antialias, even where the weights are equal."""
    plain, registers = tiny_original(), tiny_original(num_register_tokens=0)
    registers.load_state_dict({**plain.state_dict(), "embeddings.register_tokens": torch.zeros(1, 0, 32)})
    encoders = [nopad.load(save(tmp_path / str(i), each)) for i, each in enumerate((plain, registers))]
    for grid, equal in (((1, 5, 5), True), ((1, 3, 2), False)):
        pack = nopad.Pack.of([torch.randn(3, grid[1] * 4, grid[2] * 4)], 4)
        with torch.no_grad():
            tokens = [encoder(pack) for encoder in encoders]
        assert torch.equal(*tokens) == equal


def test_classifier_is_dropped_and_its_backbone_loads(tmp_path):
    original = Dinov2ForImageClassification(tiny_original().config)
    randomize(original)
    original.eval().save_pretrained(tmp_path)
    assert "classifier.weight" in load_file(tmp_path / "model.safetensors")
    assert_parity("dinov2", nopad.load(tmp_path), original.dinov2)


@pytest.mark.parametrize("changes", [{}, GATED, {"num_register_tokens": 2}])
def test_bare_file_without_config(tmp_path, changes):
    original = tiny_original(**changes, **HEADS_OF_64)
    write(tmp_path, published(original), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert (encoder.config.num_attention_heads, encoder.config.image_size) == (2, 20)
    assert encoder.config.mlp_ratio == original.config.mlp_ratio
    assert_parity("dinov2", encoder, original)


def test_bare_file_of_unknown_sizes_says_what_is_missing(tmp_path):
    path = tmp_path / "model.safetensors"
    state = published(tiny_original())
    write(tmp_path, state, None)
    with pytest.raises(ValueError, match=r"64 wide.*width is 32; add a config\.json with num_attention_heads"):
        nopad.load(path)
    write(tmp_path, {**state, "embeddings.position_embeddings": torch.zeros(1, 25, 32)}, None)
    with pytest.raises(ValueError, match="expected a square number of learned positions, got 24"):
        nopad.load(path)
    write(tmp_path, {**state, "encoder.layer.0.mlp.fc1.weight": torch.zeros(40, 32)}, None)
    with pytest.raises(ValueError, match="whole number of times the width 32, got 40"):
        nopad.load(path)


def test_bare_file_of_timm_is_refused_whatever_its_width(tmp_path):
    """It has the names of Meta's but for the mask token; timm resamples positions in another way."""
    state = meta(tiny_original(**HEADS_OF_64))
    del state["mask_token"]
    write(tmp_path, state, None)
    with pytest.raises(ValueError, match=r"timm's layout needs timm's config\.json"):
        nopad.load(tmp_path / "model.safetensors")


def test_gated_width_is_that_of_the_giant():
    assert swiglu_size(4 * 1536) == 4096
    assert swiglu_size(4 * 32) == 88


def test_fresh_layer_scales_are_the_configs():
    encoder = nopad.DINOv2Packing(DINOv2PackingConfig(**tiny_original(layerscale_value=0.25).config.to_dict()))
    assert torch.equal(encoder.layers[0].layer_scale1.lambda1, torch.full((32,), 0.25))
    assert not encoder.embeddings.mask_token.any()
    assert 0.01 < encoder.embeddings.position_embeddings.std() < 0.03


TIPSV2 = {
    "plain": {},
    "gated": GATED,
    "no registers": {"num_register_tokens": 0},
    "tanh": {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3, "mlp_ratio": 2, "qkv_bias": False},
}


@pytest.mark.parametrize("variant", TIPSV2)
@pytest.mark.parametrize("dialect", [meta, tipsv2, in_memory])
def test_tipsv2_is_loaded_and_saved_by_its_published_names(tmp_path, dialect, variant):
    original = tiny_tipsv2(**TIPSV2[variant])
    encoder = nopad.load(save(tmp_path / "in", original, dialect))
    assert type(encoder) is TIPSv2Packing
    assert encoder.num_parameters() == original.num_parameters()
    assert_parity("tipsv2", encoder, original, tolerance=1e-5)
    encoder.save_pretrained(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == meta(original).keys()
    reloaded, info = Tipsv2VisionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert_parity("tipsv2", nopad.load(tmp_path / "out"), reloaded)


def test_files_that_transformers_saves_of_tipsv2(tmp_path):
    original = tiny_tipsv2()
    original.save_pretrained(tmp_path)
    encoder = nopad.load(tmp_path)
    assert encoder.dialect == "transformers, TIPSv2"
    assert_parity("tipsv2", encoder, original, tolerance=1e-5)
    report = align(tmp_path)
    assert report.passed, [case.failures for case in report.cases]
    assert report.reference == "transformers Tipsv2VisionModel"


@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 1.5}, {**GATED, "mlp_ratio": 4}])
def test_bare_file_of_one_register_is_tipsv2(tmp_path, changes):
    original = tiny_tipsv2(hidden_size=768, num_attention_heads=12, num_hidden_layers=2, **changes)
    encoder = nopad.load(save_meta(tmp_path / "weights.pth", original))
    assert type(encoder) is TIPSv2Packing
    assert encoder.config.mlp_ratio == original.config.mlp_ratio
    assert_parity("tipsv2", encoder, original, grids=[(1, 3, 4)])


def test_positions_of_tipsv2_are_resampled_bilinearly(tmp_path):
    """As of no other class: the same weights in one with registers have other features where the grid differs."""
    folder = save(tmp_path, tiny_tipsv2(mlp_ratio=2), meta)
    bilinear, bicubic = nopad.load(folder), TIPSv2Packing.from_pretrained(folder, positions_mode="bicubic")
    for grid, equal in (((1, 5, 5), True), ((1, 3, 2), False)):
        pack = nopad.Pack.of(pixels_of([grid]), 4)
        with torch.no_grad():
            assert torch.equal(bilinear(pack), bicubic(pack)) == equal
    with pytest.raises(ValueError, match=r"positions_mode: expected 'bicubic' or 'bilinear', got 'nearest'"):
        TIPSv2Packing.from_pretrained(folder, positions_mode="nearest")


@pytest.mark.parametrize("more", [{}, {"size": {"height": 28, "width": 28}, "do_normalize": False}])
def test_images_of_tipsv2_are_squares_without_statistics(tmp_path, more):
    folder = save(tmp_path, tiny_tipsv2(image_size=28), meta)
    config = {"image_processor_type": "Tipsv2ImageProcessor", "image_mean": [0.5] * 3, **more}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    assert nopad.load(folder).preprocessing == Preprocessing(rule="square", size=28, resample="bilinear", **plain)


# Counted by transformers' own models.
PARAMETERS = {
    "facebook/dinov2-small": 22_056_576,
    "facebook/dinov2-base": 86_580_480,
    "facebook/dinov2-large": 304_368_640,
    "facebook/dinov2-giant": 1_136_480_768,
    "facebook/dinov2-with-registers-small": 22_058_112,
    "facebook/dinov2-with-registers-base": 86_583_552,
    "facebook/dinov2-with-registers-large": 304_372_736,
    "facebook/dinov2-with-registers-giant": 1_136_486_912,
    "google/tipsv2-b14": 86_316_288,
    "google/tipsv2-l14": 304_016_384,
    "google/tipsv2-so400m14": 413_393_904,
    "google/tipsv2-g14": 1_135_952_384,
}
CLASSES = {"tipsv2": TIPSv2PackingConfig, "registers": DINOv2WithRegistersPackingConfig, "": DINOv2PackingConfig}


def test_published_models_have_their_published_sizes():
    published = nopad.DINOv2Packing.published
    assert published.keys() == PARAMETERS.keys()
    for name in published:
        config = nopad.DINOv2Packing.published_config(name)
        with torch.device("meta"):
            model = nopad.DINOv2Packing(config)
        kind = next(kind for kind in CLASSES if kind in name)
        assert type(config) is CLASSES[kind]
        assert model.num_parameters() == PARAMETERS[name]
        assert (model.patch_size, model.num_prefix_tokens) == (14, {"tipsv2": 2, "registers": 5, "": 1}[kind])
        assert config.hidden_size // config.num_attention_heads == (72 if "so400m" in name else 64)


def test_module_at_the_address_of_the_others(tmp_path):
    original = tiny_original()
    assert spec.DINOv2Packing is nopad.DINOv2Packing
    assert_parity("dinov2", spec.DINOv2Packing(str(save(tmp_path, original))), original)

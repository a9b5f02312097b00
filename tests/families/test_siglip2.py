"""SigLIP2 and SigLIP, NaFlex and fixed sizes: parity with transformers, and what their checkpoints leave out."""

from __future__ import annotations

import json
import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from aimv2_checkpoints import write
from originals import assert_parity
from PIL import Image
from safetensors.torch import load_file
from siglip2_checkpoints import KINDS, fixed, fixed_composite, folder_of, naflex, naflex_composite
from transformers import AutoModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import nopad
from model_factory.vit_siglip2_packing_hf import Siglip2NaflexPacking
from nopad.align.run import align
from nopad.kernels import attention as varlen

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.mark.parametrize("changes", [{"vision_use_head": False}, {"hidden_size": 144, "num_attention_heads": 2}])
def test_tokens_and_pooling_equal_the_original(tmp_path, kind, changes):
    original = kind(**changes)
    encoder = nopad.load(folder_of(tmp_path, original))
    assert isinstance(encoder, Siglip2NaflexPacking)
    assert type(encoder).config_class is type(encoder.config)
    assert encoder.family == "siglip2"
    assert (encoder.head is None) == ("vision_use_head" in changes)
    assert_parity("siglip2", encoder, original, tolerance=1e-5)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_heads_of_72(tmp_path, kind, backend, monkeypatch):
    """so400m's head size: both kernels take it, and layers and head alike take the kernel that was asked for."""
    original = kind(hidden_size=144, num_attention_heads=2)
    encoder = nopad.load(folder_of(tmp_path, original), attention=backend)
    assert encoder.attention_backend == backend
    used, select = [], varlen._select
    monkeypatch.setattr(varlen, "_select", lambda *needs: used.append((needs[0], needs[3])) or select(*needs))
    assert_parity("siglip2", encoder, original, tolerance=1e-5)
    assert used == [(backend, 72)] * 4


def test_a_composite_folder_gives_its_vision_tower(tmp_path):
    for name, composite in {"naflex": naflex_composite(), "fixed": fixed_composite()}.items():
        composite.save_pretrained(tmp_path / name)
        names = set(load_file(tmp_path / name / "model.safetensors"))
        assert {"logit_scale", "logit_bias", "vision_model.head.probe", "text_model.head.weight"} <= names
        assert_parity("siglip2", nopad.load(tmp_path / name), composite.vision_model)


def test_defaults_that_transformers_leaves_out_of_the_config(tmp_path, kind):
    original = kind(hidden_size=48, num_attention_heads=12, num_hidden_layers=12)
    config = original.config.to_dict()
    for name in ("num_attention_heads", "num_hidden_layers", "vision_use_head", "layer_norm_eps", "hidden_act"):
        config.pop(name, None)  # transformers 5.17 does not write vision_use_head
    assert_parity("siglip2", nopad.load(write(tmp_path / "whole", original.state_dict(), config)), original)
    last = "encoder.layers.11."
    short = {name: tensor for name, tensor in original.state_dict().items() if not name.startswith((last, "head."))}
    with pytest.raises(ValueError, match=r"27 missing: encoder\.layers\.11\."):
        nopad.load(write(tmp_path / "short", short, config))


@pytest.mark.parametrize("changes", [{}, {"vision_use_head": False}])
def test_bare_file_without_config(tmp_path, kind, changes):
    original = kind(hidden_size=768, num_attention_heads=12, num_hidden_layers=1, **changes)
    write(tmp_path, original.state_dict(), None)
    encoder = nopad.load(tmp_path / "model.safetensors")
    assert encoder.config.num_attention_heads == 12
    assert_parity("siglip2", encoder, original, grids=[(1, 5, 5), (1, 3, 4)])


def test_bare_file_of_a_size_that_patches_do_not_fill(tmp_path):
    original = fixed(hidden_size=768, num_attention_heads=12, num_hidden_layers=1, patch_size=14, image_size=384)
    write(tmp_path, original.state_dict(), None)
    assert nopad.load(tmp_path / "model.safetensors").preprocessing.size == 384


def test_bare_file_of_an_unknown_width_needs_a_config(tmp_path, kind):
    original = kind()
    write(tmp_path, original.state_dict(), None)
    with pytest.raises(ValueError, match=r"\[768, 1024, 1152, 1536\], but its width is 32; add a config\.json"):
        nopad.load(tmp_path / "model.safetensors")
    write(tmp_path, original.state_dict(), {"num_attention_heads": 4})
    assert_parity("siglip2", nopad.load(tmp_path), original)


def test_positions_that_are_no_square_are_refused(tmp_path):
    original = naflex()
    state = {**original.state_dict(), "embeddings.position_embedding.weight": torch.zeros(24, 32)}
    for config in ({"num_attention_heads": 4}, {**original.config.to_dict(), "num_patches": 24}):
        with pytest.raises(ValueError, match="expected a square number of learned positions, got 24"):
            nopad.load(write(tmp_path, state, config))


def test_saved_folder_is_one_of_its_kind(tmp_path, kind):
    original = kind()
    nopad.load(folder_of(tmp_path / "in", original)).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == original.config.model_type
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is type(original)


def test_a_patch_embedding_of_neither_layout_is_refused(tmp_path, kind):
    original = kind()
    state = {**original.state_dict(), "embeddings.patch_embedding.weight": torch.zeros(32, 3, 16)}
    with pytest.raises(ValueError, match=r"patch_embedding\.weight' is misshapen.*got \(32, 3, 16\)"):
        nopad.load(write(tmp_path, state, original.config.to_dict()))


def test_naflex_resamples_silently_and_cannot_be_strict(tmp_path, caplog):
    original = naflex()
    folder = folder_of(tmp_path, original)
    with pytest.raises(ValueError, match="NaFlex checkpoints resample"):
        nopad.load(folder, positions="strict")
    with caplog.at_level(logging.WARNING, "nopad"):
        assert_parity("siglip2", nopad.load(folder), original)
    assert not [record for record in caplog.records if record.name.startswith("nopad")]


def photos():
    generator = torch.Generator().manual_seed(0)
    sizes = [(70, 50), (40, 190), (22, 22), (640, 480)]
    return [
        Image.fromarray(torch.randint(0, 255, (*size, 3), dtype=torch.uint8, generator=generator).numpy())
        for size in sizes
    ]


def test_naflex_pixels_are_the_processors(tmp_path):
    encoder = nopad.load(folder_of(tmp_path, naflex()))
    images = photos()
    pack = encoder.pack(images, resize="pil")
    expected = Siglip2ImageProcessorPil(patch_size=4)(images, return_tensors="pt")
    assert pack.grid_thw[:, 1:].tolist() == expected["spatial_shapes"].tolist()
    assert pack.grid_thw.prod(dim=1).max() <= 256
    real = [
        row[mask.bool()] for row, mask in zip(expected["pixel_values"], expected["pixel_attention_mask"], strict=True)
    ]
    assert torch.equal(pack.hidden_states, torch.cat(real))


def test_fixed_pixels_are_the_processors(tmp_path):
    encoder = nopad.load(folder_of(tmp_path, fixed()))
    pack = encoder.pack(photos(), resize="pil")
    pixels = SiglipImageProcessorPil(size={"height": 22, "width": 22})(photos(), return_tensors="pt")["pixel_values"]
    assert pack.grid_thw.tolist() == [[1, 5, 5]] * 4
    assert torch.equal(pack.hidden_states, nopad.Pack.of(list(pixels[:, :, :20, :20]), 4).hidden_states)


def test_alignment_fails_a_wrong_head(tmp_path, kind, monkeypatch):
    folder = folder_of(tmp_path, kind())
    monkeypatch.setattr(
        "nopad.layers.pooling.MAPHead.forward", lambda self, tokens, segments: tokens[segments.cu_seqlens[:-1]]
    )
    report = align(folder)
    assert not any(case.passed for case in report.cases)
    assert max(case.max_relative for case in report.cases) < 1e-4


def test_the_specifications_script(tmp_path, monkeypatch, capsys):
    folder = folder_of(tmp_path, naflex(num_hidden_layers=1))
    script = str(ROOT / "model_factory" / "align_siglip2_packing.py")
    options = ["--ckpt", str(folder), "--device", "cpu", "--batch_size", "3", "--image_size", "24"]
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(script, run_name="__main__")
    assert re.search("6 × 6 patches, batched +108 .* ok", capsys.readouterr().out)


PARAMETERS = {
    "google/siglip-base-patch16-224": 92_884_224,
    "google/siglip2-base-patch16-224": 92_884_224,
    "google/siglip2-base-patch16-naflex": 92_930_304,
    "google/siglip-so400m-patch14-384": 428_225_600,
    "google/siglip2-so400m-patch14-384": 428_225_600,
}


def test_published_models_have_their_published_sizes():
    published = Siglip2NaflexPacking.published
    assert len(published) == 27
    for name in published:
        with torch.device("meta"):
            model = Siglip2NaflexPacking(Siglip2NaflexPacking.published_config(name))
        assert ("naflex" in name) == (model.config.model_type == "siglip2_vision_model")
        assert name not in PARAMETERS or model.num_parameters() == PARAMETERS[name]
        assert model.preprocessing.rule == ("naflex" if "naflex" in name else "square")
        assert str(model.preprocessing.size or "naflex") in name

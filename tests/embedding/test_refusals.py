"""What a job refuses: other settings, other files, wrong arguments."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import embed, table
from pictures import write_photos
from safetensors.torch import load_file, save_file

import nopad
from nopad.checkpoints.towers import open_tower
from nopad.embedding import manifest, workers
from nopad.embedding.plan import plan
from nopad.embedding.settings import Settings

CHANGES = {
    "dtype": ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now"),
    "capacity": ({"capacity": 64}, "capacity: 2048 there, 64 now"),
    "resize": ({"resize": "pil"}, "resize: torch there, pil now"),
    "max_patches": ({"max_patches": 9}, "max_patches: 4096 there, 9 now"),
    "size": ({"size": 16}, "size: native there, 16 now"),
    "min_patches": ({"min_patches": 9}, "min_patches: none there, 9 now"),
    "multiple_of": ({"multiple_of": 2}, "multiple_of: 1 there, 2 now"),
    "frames": ({"frames": 4}, "frames: 8 there, 4 now"),
    "max_pixels": ({"max_pixels": 1000}, "max_pixels: 178956970 there, 1000 now"),
    "tokens": ({"tokens": True}, "tokens: no there, yes now"),
    "embedding_dtype": ({"embedding_dtype": "float16"}, "embedding_dtype: float32 there, float16 now"),
    "embedding_list": ({"embedding_list": "variable"}, "embedding_list: fixed there, variable now"),
    "shard_size": ({"shard_size": 4}, "shard_size: 5 there, 4 now"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model) -> tuple[Path, Path]:
    """A source and a finished job of it, which refusals leave as it is."""
    folder = tmp_path_factory.mktemp("begun")
    write_photos(folder / "photos", 6)
    embed(folder / "photos", folder / "out", model)
    return folder / "photos", folder / "out"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_refused(begun, model, change):
    options, line = CHANGES[change]
    before = table(begun[1])
    with pytest.raises(ValueError, match="holds a job with other settings:\n") as caught:
        embed(*begun, model, **options)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{begun[1]} holds a job with other settings:"
    assert len(lines) == 3
    assert re.fullmatch(line, lines[1].strip())
    assert lines[2] == "use the settings that it was begun with, or another folder"
    assert table(begun[1]) == before


def test_a_revision_is_the_hubs_and_part_of_the_record(begun, tmp_path, monkeypatch, model):
    """The Hub is a folder here."""
    asked = []

    def load(name, *, revision, **options):
        asked.append(revision)
        return nopad.load(name, **options)

    monkeypatch.setattr(workers, "load", load)
    monkeypatch.setattr(workers, "processor", lambda name, *, revision, **options: nopad.processor(name, **options))
    monkeypatch.setattr(workers, "open_tower", lambda *arguments, revision: open_tower(*arguments))
    embed(begun[0], tmp_path / "out", model, revision="v1")
    assert nopad.read_features(tmp_path / "out").metadata["revision"] == "v1"
    with pytest.raises(ValueError, match="revision: v1 there, v2 now"):
        embed(begun[0], tmp_path / "out", model, revision="v2")
    assert asked == ["v1", "v2"]


def test_features_are_those_of_evaluation_in_the_encoders_dtype(begun, tmp_path, model):
    encoder = nopad.load(model)
    with torch.autocast("cpu", torch.bfloat16):
        embed(begun[0], tmp_path / "out", encoder)
    assert np.array_equal(nopad.read_features(tmp_path / "out").embeddings, nopad.read_features(begun[1]).embeddings)
    encoder.train()
    for run_it in (lambda: embed(begun[0], tmp_path / "out", encoder), lambda: encoder.embed([])):
        with pytest.raises(ValueError, match=r"encoder: expected in evaluation mode.*call its eval\(\) first"):
            run_it()


def test_another_version_model_or_source_is_refused(begun, tmp_path, monkeypatch, model, clip_model):
    shutil.copytree(begun[0], tmp_path / "photos")
    with pytest.raises(ValueError, match=r'sources: \[".*photos"\] there, \[".*photos/"\] now'):
        embed(f"{tmp_path}/photos/", begun[1], model)
    with pytest.raises(ValueError, match=r"(?s)model: .*family: aimv2 there, onevision now.*weights: "):
        embed(*begun, clip_model)
    monkeypatch.setattr(manifest, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=rf"version: {re.escape(nopad.__version__)} there, 9.9.9 now"):
        embed(*begun, model)


def test_a_model_that_changed_in_place_is_refused(photos, tmp_path, model):
    changed = shutil.copytree(model, tmp_path / "model")
    embed(photos, tmp_path / "out", changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match=r"settings:\n  architecture: num_attention_heads 4 there, 2 now\nuse"):
        embed(photos, tmp_path / "out", changed)
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"settings:\n  preprocessing: .* mean 0.5, 0.5, 0.5; .* now\nuse"):
        embed(photos, tmp_path / "out", changed)
    (changed / "preprocessor_config.json").unlink()
    weights = load_file(changed / "model.safetensors")
    save_file({**weights, "rms_norm.weight": weights["rms_norm.weight"] * 1.001}, changed / "model.safetensors")
    with pytest.raises(ValueError, match=r"settings:\n  weights: [0-9a-f]{64} there, [0-9a-f]{64} now\nuse"):
        embed(photos, tmp_path / "out", changed)


def test_layers_that_run_otherwise_are_refused(photos, tmp_path, model):
    encoder = nopad.load(model)
    nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)
    encoder.compile(2048, compiled=False)
    with pytest.raises(ValueError, match="compile: no there, yes now"):
        nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames: expected ≥ 1, got 0"),
        ({"max_pixels": 0}, "max_pixels: expected ≥ 1, got 0"),
        ({"capacity": 0}, "capacity: expected ≥ 1, got 0"),
        ({"workers": 0}, "workers: expected ≥ 1, got 0"),
        ({"actors": 0}, "actors: expected ≥ 1, got 0"),
        ({"shard_size": 0}, "shard_size: expected ≥ 1, got 0"),
        ({"max_patches": 0}, "max_patches: expected ≥ 1, got 0"),
        ({"size": 0}, r"size: expected 'model', 'native', pixels ≥ 1 of the short side, or the tuple \(height, "),
        ({"size": "large"}, "size: expected 'model', 'native', .* got 'large'"),
        ({"min_patches": 0}, "min_patches: expected ≥ 1, got 0"),
        ({"multiple_of": 0}, "multiple_of: expected ≥ 1, got 0"),
        ({"max_patches": "all"}, "max_patches: expected an integer ≥ 1, got 'all'"),
        ({"shard_size": 2.5}, r"shard_size: expected an integer ≥ 1, got 2\.5"),
        ({"capacity": "5"}, "capacity: expected an integer ≥ 1, got '5'"),
        ({"actors": True}, "actors: expected an integer ≥ 1, got True"),
        ({"tokens": "no"}, "tokens: expected True or False, got 'no'"),
        ({"stop": True}, r"stop: expected a threading\.Event, got True"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"precision": "fp4"}, "precision: expected one of fp8, int8, got 'fp4'"),
        ({"compile": 1}, "compile: expected True or False, got 1"),
        ({"device": "abacus"}, "device: expected cpu, cuda, cuda:1, …, got 'abacus'"),
        ({"device": "meta"}, "device: expected cpu, cuda, cuda:1, …, got 'meta'"),
        ({"resize": "lanczos"}, "resize: expected one of torch, pil, got 'lanczos'"),
        ({"frames": None}, "frames: expected an integer ≥ 1, got None"),
        ({"embedding_dtype": "float64"}, "embedding_dtype: expected one of float32, float16, got 'float64'"),
        ({"embedding_list": "nested"}, "embedding_list: expected one of fixed, variable, got 'nested'"),
        ({"attention": "magic"}, "attention: expected 'auto' or one of"),
        ({"keep": "nope"}, "keep: no source has a column 'nope'"),
    ],
)
def test_a_wrong_argument_begins_no_job(photos, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        embed(photos, tmp_path / "out", model, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens_pool": 2}, "tokens_pool: goes with tokens, which are not kept, got 2"),
        ({"size": (8, 8), "max_patches": 4}, "max_patches: expected None for 'height_width'"),
        ({"size": 2}, "size: expected a short side of at least a patch of 4 × 4 pixels, got 2"),
        ({"model": "untrained:facebook/dinov9"}, "expected the name of a published model; did you mean"),
    ],
)
def test_a_setting_that_the_model_refuses_is_an_error_before_sources_are_listed(tmp_path, model, options, message):
    models = [options["model"]] if "model" in options else [model, nopad.load(model)]
    for each in models:
        with pytest.raises(ValueError, match=message):
            nopad.embed(tmp_path / "nothing", tmp_path / "out", **{**options, "model": each})


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"device": "cpu"},
        {"precision": "fp8"},
        {"compile": False},
        {"revision": "a"},
        {"prefix": "vision_tower"},
        {"attention": "sdpa"},
        {"actors": 1},
    ],
)
def test_an_encoder_brings_its_own(photos, tmp_path, model, options):
    with pytest.raises(
        ValueError, match="model: an encoder brings its own device, dtype, precision, revision, prefix and attention"
    ):
        embed(photos, tmp_path / "out", nopad.load(model), **options)
    assert not (tmp_path / "out").exists()


def test_wrong_sources_and_models_begin_no_job(photos, tmp_path, model):
    for sources, message in (
        ([], "sources: expected a list"),
        (tmp_path / "nothing", "nothing: cannot be opened: No such file"),
        (model, "no image or video in it; left out: 1 .json, 1 .safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(sources, tmp_path / "out", model)
        assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="nowhere"):
        embed(photos, tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["photo.jpg", "photo.jpg/table"])
def test_a_file_instead_of_the_folder(begun, model, tmp_path, out):
    """Said before sources are listed, of which this one is none."""
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(OSError, match=r"; it (lies in|is) a file; name a folder"):
        embed(begun[0] / "nothing", tmp_path / out, model)
    with pytest.raises(OSError, match=r"; it (lies in|is) a file; name a folder"):
        plan([str(begun[0] / "nothing")], Settings(model=str(model)), out=str(tmp_path / out))
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"

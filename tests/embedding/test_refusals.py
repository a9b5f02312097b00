"""What a job refuses: other settings, other files, wrong arguments."""

import json
import os
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
from nopad.checkpoints.files import open_checkpoint
from nopad.embedding import job, manifest, workers
from nopad.embedding.inputs import listing as inputs
from nopad.embedding.inputs.listing import Input
from nopad.embedding.lock import LostLockError

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
def test_a_changed_setting_is_told(begun, model, change):
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
    monkeypatch.setattr(workers, "open_checkpoint", lambda name, *, revision: open_checkpoint(name))
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


def test_another_version_model_or_source_is_told(begun, tmp_path, monkeypatch, model, clip_model):
    shutil.copytree(begun[0], tmp_path / "photos")
    with pytest.raises(ValueError, match=r'sources: \[".*photos"\] there, \[".*photos/"\] now'):
        embed(f"{tmp_path}/photos/", begun[1], model)
    with pytest.raises(ValueError, match=r"(?s)model: .*family: aimv2 there, onevision now.*weights: "):
        embed(*begun, clip_model)
    monkeypatch.setattr(manifest, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=rf"version: {re.escape(nopad.__version__)} there, 9.9.9 now"):
        embed(*begun, model)


def test_a_model_that_changed_in_place_is_told(photos, tmp_path, model):
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


def test_shards_of_somebody_else(photos, tmp_path, model):
    (tmp_path / "out").mkdir()
    foreign = tmp_path / "out" / "shard-00000-of-00001-abcdef123456.parquet"
    foreign.touch()
    with pytest.raises(ValueError, match=f"{foreign}: not a shard of this job; move it away or use another folder"):
        embed(photos, tmp_path / "out", model)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [foreign.name]
    foreign.unlink()
    embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / "shard-mine.parquet").touch()
    with pytest.raises(ValueError, match="not a shard of this job"):
        embed(photos, tmp_path / "out", model)


def test_files_that_are_no_shards_of_the_job_are_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    first, second, third = (tmp_path / "out" / name for name in sorted(before))
    for stray in ("shard-00099-of", "shard-00003-of", "shard-000000-of"):
        path = tmp_path / "out" / first.name.replace("shard-00000-of", stray)
        shutil.copy(first, path)
        with pytest.raises(ValueError, match=f"{path}: not a shard of this job; move it away or use another folder"):
            embed(photos, tmp_path / "out", model)
        path.unlink()

    second.unlink()
    shutil.copy(first, second)
    refused = f"{second}: not this shard: shard 0, expected 1; move it away and run the job again"
    with pytest.raises(ValueError, match=refused):
        embed(photos, tmp_path / "out", model)
    with pytest.raises(ValueError, match=f"{second}: a copy of shard 0; move it away"):
        nopad.read_features(tmp_path / "out")
    second.unlink()
    assert embed(photos, tmp_path / "out", model).done == 5
    assert table(tmp_path / "out") == before

    os.rename(first, tmp_path / "away")
    os.rename(third, first)  # of other rows, too
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()  # shards that fit are kept, no others
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    assert not (tmp_path / "out" / ".nopad" / "job.json").exists()


def test_shard_of_another_job_under_this_jobs_name_is_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    embed(photos, tmp_path / "other", model, capacity=64)
    [*_, last] = sorted((tmp_path / "out").glob("*.parquet"))
    shutil.copy(sorted((tmp_path / "other").glob("*.parquet"))[-1], last)
    with pytest.raises(ValueError, match=f"{last}: not this shard: capacity 64, expected 2048"):
        embed(photos, tmp_path / "out", model)


@pytest.mark.parametrize("when", ["before it is begun", "before a shard", "while a shard is written"])
def test_folder_that_is_begun_anew_gets_no_shard_of_the_first_job(photos, tmp_path, monkeypatch, model, when):
    out = tmp_path / "out"
    embed(photos, tmp_path / "whole", model)

    def begin_anew(*arguments, **options):
        monkeypatch.undo()
        if when == "while a shard is written":
            shutil.rmtree(out)
            embed(photos, out, model)
            for path in out.glob("*.parquet"):
                path.unlink()
            return real(*arguments, **options)
        shutil.rmtree(out)
        embed(photos, out, model)
        return real(*arguments, **options)

    if when == "before it is begun":
        real, place = job.JobFolder.begin, (job.JobFolder, "begin")
    elif when == "before a shard":
        real, place = job.Job.write, (job.Job, "write")
    else:
        real, place = job.write_shard, (job, "write_shard")
    monkeypatch.setattr(*place, begin_anew)
    with pytest.raises(LostLockError, match=f"{out}: removed or begun anew while this job ran"):
        embed(photos, out, model)
    assert table(out) == ({} if when == "while a shard is written" else table(tmp_path / "whole"))
    assert not list(out.rglob("*.part"))
    embed(photos, out, model)
    assert table(out) == table(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("job.json", b'{"version": "0.1'),
        ("job.json", b"[]"),
        ("job.json", b'{"inputs": 3}'),
        ("job.json", b'{"inputs": "", "threads": "-1"}'),
        ("job.json", b"\xff"),
        ("job.json", b"[" * 100_000),
        ("job.json", b'{"model": [], "sources": "[[], 5]"}'),
        ("job.json", b'{"model": "a", "sources": "' + b"[" * 100_000 + b'"}'),
        ("inputs.parquet", b"PAR1"),
        ("inputs.parquet", None),
    ],
)
def test_damaged_files_of_a_job(photos, tmp_path, model, name, data):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / ".nopad" / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the job's files cannot be read \(.*\); remove job\.json there and run"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()
    assert embed(photos, tmp_path / "out", model).done == 0
    assert table(tmp_path / "out") == before


def test_layers_that_run_otherwise_are_told(photos, tmp_path, model):
    encoder = nopad.load(model)
    nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)
    encoder.compile(2048, compiled=False)
    with pytest.raises(ValueError, match="compile: no there, yes now"):
        nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)


def test_a_list_of_another_job(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    inputs.InputList.of([Input("a", "b", "image", b"/a")]).save(tmp_path / "out" / ".nopad" / "inputs.parquet")
    with pytest.raises(ValueError, match=r"inputs\.parquet is not the list that job\.json was begun with"):
        embed(photos, tmp_path / "out", model)


def test_a_damaged_shard(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / next(iter(before))
    path.write_bytes(before[path.name][:-100])
    with pytest.raises(ValueError, match=f"{path}: damaged .*; delete it and run the job again"):
        embed(photos, tmp_path / "out", model)
    path.unlink()
    embed(photos, tmp_path / "out", model)
    assert table(tmp_path / "out") == before


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
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(OSError, match=r"; it (lies in|is) a file; name a folder"):
        embed(begun[0], tmp_path / out, model)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"

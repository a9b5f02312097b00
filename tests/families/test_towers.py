"""Vision towers inside checkpoints of larger models: found, read strictly, compared, and written back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import vlm_checkpoints
from aimv2_checkpoints import write
from clip_checkpoints import tiny_original
from moonvit_checkpoints import run as run_moonvit
from originals import max_relative
from qwen2_vl_checkpoints import run as run_qwen2
from qwen3_vl_checkpoints import run as run_qwen
from radio_checkpoints import run as run_radio
from safetensors.torch import load_file, save_file
from siglip2_checkpoints import run as run_siglip
from tiny_encoders import pack_of
from vlm_checkpoints import KINDS, save, tower_of

import nopad
from nopad.align.run import align
from nopad.checkpoints import contents, towers
from nopad.cli import main

PHOTO = Path(__file__).parents[2] / "examples" / "images" / "cat_eye_small.png"
GRIDS = [(5, 5), (3, 7), (1, 6)]
NO_PARAMETERS = r"head_|\.summary_idxs$|\.video_embedder\."
"""Of a tower's tensors, those that are no parameters of its encoder."""
QWEN = [name for name in KINDS if KINDS[name][2] == "model.visual"]


def tokens_of(model_type, tower, image):
    """Normed tokens of the model's own tower."""
    kind = KINDS[model_type][0]["model_type"]
    if kind == "ovis2_vision":
        return tower(image[None]).last_hidden_state[0]
    if kind.startswith("qwen2"):
        return run_qwen2(tower, image).tokens
    if model_type in QWEN:
        return run_qwen(tower, image).tokens
    if kind == "kimi_k25_vision":
        return run_moonvit(tower, image)
    if kind == "radio":
        return run_radio(tower, image)[0]
    if kind == "pixtral":
        return tower(image[None]).last_hidden_state[0]
    if kind == "tipsv2_vision_model":
        return tower(image[None]).last_hidden_state[0, 2:]
    if kind == "clip_vision_model":
        output = tower(pixel_values=image[None], interpolate_pos_encoding=True)
        return tower.post_layernorm(output.last_hidden_state[0, 1:])
    return run_siglip(tower, image)[0]


@torch.no_grad()
def assert_parity(model_type, encoder, model):
    grids, size = [(4, 4)] if model_type == "ovis2" else GRIDS, 4 * encoder.merge_size
    images = [torch.randn(3, size * rows, size * columns) for rows, columns in grids]
    pack = pack_of(encoder, images)
    for tokens, image in zip(pack.unpack(encoder(pack)), images, strict=True):
        assert max_relative(tokens.flatten(0, 2), tokens_of(model_type, tower_of(model, model_type), image)) < 1e-4


def test_every_model_type_in_the_table_is_tested():
    assert KINDS.keys() == towers.TOWERS.keys()
    assert all(tower["model_type"] == towers.TOWERS[name] for name, (tower, *_) in KINDS.items())


@pytest.mark.parametrize("model_type", KINDS)
def test_tower_is_found_has_its_models_features_and_is_written_back(tmp_path, model_type):
    model = save(tmp_path / "whole", model_type)
    encoder = nopad.load(tmp_path / "whole")
    assert encoder.tower_prefix.endswith(("vision_tower.", "vision_model.", "vision_encoder.", "visual."))
    assert_parity(model_type, encoder, model)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    encoder.save_into(tmp_path / "whole", tmp_path / "changed")
    changed, info = type(model).from_pretrained(tmp_path / "changed", output_loading_info=True)
    assert not any(info.values()), info
    assert_parity(model_type, encoder, changed)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "changed"))
    assert before.keys() == after.keys()
    rest = {name for name in before if not name.startswith(encoder.tower_prefix) or re.search(NO_PARAMETERS, name)}
    assert rest
    assert {name for name in before if torch.equal(before[name], after[name])} == rest


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
def test_config_without_the_towers_type_has_that_of_the_table(tmp_path, model_type):
    model = save(tmp_path, model_type)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vision_config"]["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_parity(model_type, nopad.load(tmp_path), model)


def older_names(folder):
    """The names of files by transformers < 5, with one more part for the tower's own class."""
    state = load_file(folder / "model.safetensors")
    prefix = "vision_tower."
    renamed = {name.replace(prefix, f"{prefix}vision_model.", 1): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return renamed


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
@pytest.mark.parametrize("prefix", [None, "vision_tower", "vision_tower.vision_model."])
def test_names_of_older_files(tmp_path, model_type, prefix):
    model = save(tmp_path / "whole", model_type)
    before = older_names(tmp_path / "whole")
    encoder = nopad.load(tmp_path / "whole", prefix=prefix)
    assert_parity(model_type, encoder, model)
    with torch.no_grad():
        encoder.norm.bias.zero_()
    encoder.save_into(tmp_path / "whole", tmp_path / "changed")
    after = load_file(tmp_path / "changed" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "vision_tower.vision_model.post_layernorm.bias"
    }


def test_files_without_the_tower_are_not_opened_and_stay_as_they_are(tmp_path, monkeypatch):
    model = save(tmp_path / "whole", "gemma3", max_shard_size="6KB")
    index = json.loads((tmp_path / "whole" / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("vision_tower.")}
    others = set(index.values()) - needed
    assert len(needed) > 1
    assert others
    opened, read = set(), contents._read_safetensors
    monkeypatch.setattr(contents, "_read_safetensors", lambda path: opened.add(path.name) or read(path))
    encoder = nopad.load(tmp_path / "whole")
    assert opened == needed
    assert_parity("gemma3", encoder, model)
    with torch.no_grad():
        encoder.norm.weight.mul_(2)
    (tmp_path / "whole" / "more").mkdir()
    (tmp_path / "whole" / "more" / "notes.txt").write_text("kept")
    encoder.save_into(tmp_path / "whole", tmp_path / "changed")
    file = index["vision_tower.post_layernorm.weight"]
    for path in (tmp_path / "whole").rglob("*.*"):
        same = path.read_bytes() == (tmp_path / "changed" / path.relative_to(tmp_path / "whole")).read_bytes()
        assert same == (path.name != file)
    for other in others:  # nor are they needed
        (tmp_path / "whole" / other).unlink()
    assert_parity("gemma3", nopad.load(tmp_path / "whole"), model)


def test_tower_of_half_precision_is_written_back_in_its_dtype(tmp_path):
    model = vlm_checkpoints.tiny_vlm("llava").bfloat16()
    model.save_pretrained(tmp_path / "whole")
    encoder = nopad.load(tmp_path / "whole", dtype=torch.float32)
    assert nopad.load(tmp_path / "whole").dtype == torch.bfloat16
    encoder.save_into(tmp_path / "whole", tmp_path / "same")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()


def test_writing_that_fails_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "whole", "llava")
    encoder = nopad.load(tmp_path / "whole")

    def fail(path, tensors):
        raise OSError("disk full")

    monkeypatch.setattr("nopad.checkpoints.insert._overwrite", fail)
    with pytest.raises(OSError, match="disk full"):
        encoder.save_into(tmp_path / "whole", tmp_path / "changed")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_targets_and_sources_that_do_not_fit_are_refused(tmp_path):
    save(tmp_path / "whole", "llava")
    encoder = nopad.load(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"target: .* does not exist yet, got '.*whole'"):
        encoder.save_into(tmp_path / "whole", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"source: expected a folder on this machine"):
        encoder.save_into(tmp_path / "nowhere", tmp_path / "changed")
    save(tmp_path / "other", "llava", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"16 unexpected: encoder\.layers\.2\."):
        encoder.save_into(tmp_path / "other", tmp_path / "changed")
    save(tmp_path / "siglip", "gemma3")
    with pytest.raises(ValueError, match=r"source .*: expected tensors of clip"):
        encoder.save_into(tmp_path / "siglip", tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_layouts_that_are_prepared_are_not_written_back(goldens, tmp_path):
    encoder = nopad.load(goldens / "timm-dinov2-gated")
    with pytest.raises(ValueError, match=r"under timm names cannot be written back"):
        encoder.save_into(goldens / "timm-dinov2-gated", tmp_path / "changed")
    clip = nopad.load(goldens / "timm-clip-projection")
    clip.save_into(goldens / "timm-clip-projection", tmp_path / "same")
    name = "model.safetensors"
    assert (tmp_path / "same" / name).read_bytes() == (goldens / "timm-clip-projection" / name).read_bytes()


def test_two_towers_are_named(tmp_path):
    two_towers(tmp_path)
    with pytest.raises(
        ValueError, match=r"one vision tower, got .*'other\.' \(clip\).*; choose one by prefix="
    ) as error:
        nopad.load(tmp_path)
    assert "'vision_tower.' (siglip2)" in str(error.value)
    assert nopad.load(tmp_path, prefix="vision_tower").family == "siglip2"
    assert nopad.Siglip2NaflexPacking.from_pretrained(tmp_path).tower_prefix == "vision_tower."  # its family's only one


def two_towers(folder):
    """A checkpoint with SigLIP below `vision_tower.` and CLIP below `other.`."""
    save(folder, "gemma3")
    state = load_file(folder / "model.safetensors")
    state |= {f"other.{name}": tensor for name, tensor in tiny_original().state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


BENCH = "--images 2 --capacity 2048 --runs 1 --no-baselines --no-compile"
COMMANDS = {
    "align": "align {model} --device cpu",
    "batch invariance": "align {model} --device cpu --batch-invariance --capacity 512",
    "bench": "bench {model} --device cpu --workload small " + BENCH,
    "view": "view {photo} --model {model} --device cpu --out {out}.html --kind pca",
    "embed": "embed {photo} --model {model} --device cpu --out {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_checkpoint_takes_its_prefix(tmp_path, capsys, command):
    places = {"model": two_towers(tmp_path / "model"), "photo": PHOTO, "out": tmp_path / "out"}
    arguments = [part.format(**places) for part in COMMANDS[command].split()]
    assert main(arguments) == 2
    assert re.search(
        r"nopad \w+: .*one vision tower, got .*; choose one by prefix= or --prefix", capsys.readouterr().err
    )
    assert main([*arguments, "--prefix", "vision_tower"]) == 0, capsys.readouterr().err
    if command != "embed":
        return
    assert nopad.read_features(tmp_path / "out").metadata["prefix"] == "vision_tower"
    search = ["search", str(tmp_path / "out"), str(PHOTO)]
    assert main(search) == 0
    moved = [*search, "--model", str(shutil.move(tmp_path / "model", tmp_path / "moved"))]
    assert main(moved) == 2
    assert main([*moved, "--prefix", "vision_tower."]) == 0
    assert main([*search, "--prefix", "vision_tower."]) == 2
    assert "nopad search: --prefix: expected a --model whose tensors have it" in capsys.readouterr().err


def test_prefix_that_is_not_there_lists_those_that_are(tmp_path):
    save(tmp_path, "llava")
    with pytest.raises(ValueError, match=r"prefix 'visual\.': expected one of .*'vision_tower\.'"):
        nopad.load(tmp_path, prefix="visual")
    with pytest.raises(ValueError, match=r"unknown family, such as \['linear_1\.bias'"):
        nopad.load(tmp_path, prefix="multi_modal_projector")
    with pytest.raises(ValueError, match=r"prefix: .* no part of a larger model"):
        nopad.load("untrained:openai/clip-vit-base-patch32", prefix="vision_tower")


def test_tower_of_an_unknown_family_lists_the_prefixes(tmp_path):
    state = {"visual.stem.0.weight": torch.zeros(4, 4), "language_model.layers.0.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"unknown family.*its prefixes are .*'visual\.'"):
        nopad.load(write(tmp_path, state, {"model_type": "something"}))


def test_tower_is_read_strictly_within_its_prefix(tmp_path):
    save(tmp_path, "llava")
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "vision_tower.surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 unexpected: surprise"):
        nopad.load(tmp_path)
    del state["vision_tower.pre_layrnorm.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: pre_layrnorm\.bias"):
        nopad.load(tmp_path)


@pytest.mark.parametrize("model_type", ["idefics3_vision", "smolvlm_vision"])
def test_towers_with_other_arithmetic_are_refused(tmp_path, model_type):
    save(tmp_path, "gemma3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["model_type"] = model_type
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"got '{model_type}', another architecture"):
        nopad.load(tmp_path)


@pytest.mark.parametrize(
    ("processor", "rule", "size"),
    [
        ({"image_processor_type": "Gemma3ImageProcessorFast", "size": {"height": 24, "width": 24}}, "square", 24),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "crop_size": 24}, "crop", 24),
        ({"image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 9, "width": 9}}, "square", 20),
    ],
    ids=str,
)
def test_preprocessing_is_the_models_for_one_image(tmp_path, processor, rule, size, caplog):
    save(tmp_path, "gemma3")
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_pan_and_scan": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, **statistics}))
    towers._log_processor.cache_clear()
    with caplog.at_level("WARNING", "nopad"):
        preprocessing = nopad.load(tmp_path).preprocessing
    assert (preprocessing.rule, preprocessing.size, preprocessing.mean) == (rule, size, (0.1, 0.2, 0.3))
    assert bool(caplog.records) == ("Onevision" in processor["image_processor_type"])


def quantised_folder(tmp_path, model_type, part, change):
    """A model whose config says that it is quantised; `change` makes something else of the matrices below `part`."""
    model = save(tmp_path, model_type)
    config, state = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if part in name and name.endswith(".weight") and state[name].ndim == 2]:
        state |= change(name, state.pop(name))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    return model


def to_fp8(name, weight):
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}


def to_packed(name, weight):
    packed = {"qweight": weight.to(torch.int32), "scales": torch.ones(1)}
    return {f"{name.removesuffix('weight')}{part}": tensor.contiguous() for part, tensor in packed.items()}


@pytest.mark.parametrize("change", [to_fp8, to_packed])
@pytest.mark.parametrize("model_type", ["llava", "nemotron_h_omni", "qwen3_vl", "kimi_k25"])
def test_tower_beside_a_quantised_language_model_is_read_and_written_back(tmp_path, model_type, change):
    model = quantised_folder(tmp_path / "whole", model_type, "language_model", change)
    encoder = nopad.load(tmp_path / "whole")
    assert_parity(model_type, encoder, model)
    encoder.save_into(tmp_path / "whole", tmp_path / "same")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    encoder.save_pretrained(tmp_path / "alone")
    assert_parity(model_type, nopad.load(tmp_path / "alone"), model)


@pytest.mark.parametrize("change", [to_fp8, to_packed])
@pytest.mark.parametrize("prefix", [None, "vision_tower"])
def test_quantised_towers_are_refused(tmp_path, change, prefix):
    quantised_folder(tmp_path, "llava", "vision_tower", change)
    problem = r"weights of the tower 'vision_tower\.' are quantised, such as '(embeddings|encoder)\."
    with pytest.raises(ValueError, match=problem):
        nopad.load(tmp_path, prefix=prefix)


def test_tower_beside_a_quantised_language_model_is_embedded_in_the_dtype_of_others(tmp_path):
    quantised_folder(tmp_path / "whole", "llava", "language_model", to_fp8)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert nopad.load(tmp_path / "whole").dtype == torch.bfloat16
    nopad.embed([PHOTO], tmp_path / "out", model=tmp_path / "whole", device="cpu")
    assert nopad.read_features(tmp_path / "out").metadata["dtype"] == "float32"


@pytest.mark.parametrize(
    "model_type", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "nemotron_h_omni"]
)
def test_alignment_of_a_tower_and_its_own_folder(tmp_path, model_type):
    """What `save_pretrained` writes is the encoder alone."""
    save(tmp_path / "whole", model_type)
    report = align(tmp_path / "whole")
    assert report.passed
    assert report.weights.startswith("read from the checkpoint as it is")
    encoder = nopad.load(tmp_path / "whole")
    encoder.save_pretrained(tmp_path / "alone")
    alone = nopad.load(tmp_path / "alone")
    assert alone.tower_prefix == ""
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in encoder.state_dict().items())
    shutil.rmtree(tmp_path / "alone")

"""Messages send people the right way: a name that was nearly meant, what goes where, a count of one."""

from __future__ import annotations

import logging

import pytest
import torch
from pictures import write_photos
from tiny_encoders import tiny
from torch import nn

import nopad
from nopad import cli
from nopad.counts import counted
from nopad.embedding.progress import Estimate, Progress
from nopad.pipeline.stats import Stats
from nopad.suggestions import did_you_mean

MEANT = "apple/aimv2-large-patch14-native"
MISTYPED = (
    "apple/aimv2-large-patch14-natve",
    "Apple/AIMv2-Large-Patch14-Native",
    "aimv2-large-patch14-native",
    "https://huggingface.co/apple/aimv2-large-patch14-native",
)


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_name_gets_the_one_that_was_meant(name):
    with pytest.raises(OSError, match=rf"; did you mean .*'{MEANT}'") as raised:
        nopad.load(name)
    assert "untrained:" not in str(raised.value)
    with pytest.raises(OSError, match=rf"; did you mean .*'{MEANT}'"):
        nopad.AIMv2Packing.from_pretrained(name)


@pytest.mark.parametrize("name", MISTYPED[:3])
def test_a_mistyped_name_behind_untrained_gets_the_one_that_was_meant(name):
    for load in (nopad.load, nopad.AIMv2Packing.from_pretrained, nopad.AIMv2Packing):
        with pytest.raises(ValueError, match=rf"'untrained:{name}': .*; did you mean .*'{MEANT}'"):
            load(f"untrained:{name}")


@pytest.mark.parametrize("prefix", ["", "untrained:"])
@pytest.mark.parametrize("command", ["align", "bench", "embed"])
def test_the_command_line_says_which_name_was_meant(tmp_path, capsys, command, prefix):
    name = prefix + MISTYPED[0]
    embed = ["examples/images", "--out", str(tmp_path / "out"), "--model", name]
    assert cli.main([command, *(embed if command == "embed" else [name, "--device", "cpu"])]) == 2
    error = capsys.readouterr().err
    assert f"did you mean '{MEANT}'" in error
    assert f"untrained:{MISTYPED[0]}' gives" not in error


def test_random_weights_are_offered_for_names_that_have_them():
    with pytest.raises(OSError, match=f"'untrained:{MEANT}' gives its architecture with random weights"):
        nopad.load(MEANT)
    with pytest.raises(OSError, match="; `nopad models` lists published names") as raised:
        nopad.load("someone/of-another-kind")
    assert "untrained:" not in str(raised.value)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return nopad.load(tiny("aimv2", tmp_path_factory.mktemp("tiny") / "aimv2"))


def test_a_model_in_memory_is_no_name(encoder):
    for load in (nopad.load, nopad.AIMv2Packing.from_pretrained):
        with pytest.raises(ValueError, match=r"^checkpoint: expected a name or a path, got AIMv2Packing$"):
            load(encoder)
    with pytest.raises(ValueError, match=r"^checkpoint: expected a name or a path, got NoneType$"):
        nopad.load(None)
    with pytest.raises(
        ValueError, match=r"^checkpoint: expected a name or a path, got ''; '\.' is the current folder$"
    ):
        nopad.load("")


def test_what_is_no_list_is_no_raw_error(encoder):
    for call in (encoder.pack, encoder.embed, encoder.processor, encoder.features, encoder.attention):
        with pytest.raises(ValueError, match=r"^images: expected a list of images, got NoneType$"):
            call(
                None,
                **(
                    {"layers": [0]}
                    if call == encoder.features
                    else {"queries": [0]}
                    if call == encoder.attention
                    else {}
                ),
            )
    with pytest.raises(ValueError, match=r"^texts: expected a list of str, got NoneType$"):
        encoder.embed_text(None)
    for folder, what in ((None, "NoneType"), (3, "int"), ([None], "NoneType")):
        with pytest.raises(ValueError, match=f"^folder: expected a path or a list of them, got {what}$"):
            nopad.read(folder)


def test_embed_takes_encoders_and_names_alone(tmp_path, encoder):
    for model, what in ((nn.Linear(2, 2), "Linear"), (None, "NoneType"), (5, "int")):
        with pytest.raises(ValueError, match=rf"^model: expected an encoder of nopad, a name or a path, got {what}$"):
            nopad.embed("examples/images", tmp_path / "out", model=model)
    held = r"got Sequential; give the encoder that it holds, of a PEFT model what merge_and_unload\(\) returns$"
    with pytest.raises(ValueError, match=held):
        nopad.embed("examples/images", tmp_path / "out", model=nn.Sequential(encoder))
    assert not (tmp_path / "out").exists()


def test_embed_of_images_in_memory_names_the_method_for_them(tmp_path, encoder):
    with pytest.raises(ValueError, match=r"sources: expected paths, got Tensor; images in memory go .*\.embed\(images"):
        nopad.embed([torch.zeros(3, 4, 4)], tmp_path / "out", model=encoder)


def test_one_is_no_plural():
    assert [counted(number, "image") for number in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]
    assert [counted(number, "patch") for number in (1, 2)] == ["1 patch", "2 patches"]


def test_a_count_of_one_in_progress():
    (line,) = Estimate().lines(Progress(1, 0, Stats(), 0.0, 5.0))
    assert line == "1 image, about 5 patches each"


@pytest.fixture
def nopad_handlers(monkeypatch):
    """A list of handlers that a test may clear, so that the command line sets up its own."""
    monkeypatch.setattr(logging.root, "handlers", [])


def test_a_command_shows_each_notice_once(monkeypatch, capsys, nopad_handlers):
    def several_steps(options):
        for name, text in (("nopad.a", "first"), ("nopad.a", "first"), ("nopad.a", "second"), ("nopad.b", "first")):
            logging.getLogger(name).warning("%s", text)
        return 0

    monkeypatch.setattr(cli, "run_models", several_steps)
    for _ in range(2):  # a second command of the same process shows them again
        logging.root.handlers.clear()
        assert cli.main(["models"]) == 0
        assert capsys.readouterr().err.splitlines() == ["nopad.a: first", "nopad.a: second", "nopad.b: first"]


def test_embed_says_once_that_sources_have_changed(tmp_path, capsys, nopad_handlers, encoder):
    photos = write_photos(tmp_path / "photos", 2)
    arguments = ["--out", str(tmp_path / "out"), "--model", encoder.source]
    assert cli.main(["embed", str(photos), *arguments]) == 0
    write_photos(photos, 1, start=50)
    capsys.readouterr()
    logging.root.handlers.clear()
    assert cli.main(["embed", str(photos), *arguments]) == 0
    out, err = capsys.readouterr()
    assert (out + err).count("its sources have 1 new input and 0 are gone") == 1


def test_a_name_that_goes_on_is_suggested_before_similar_ones():
    names = ["facebook/dinov2-base", "facebook/dinov3-vits16-pretrain-lvd1689m", "facebook/dinov3-vitb16"]
    assert did_you_mean("facebook/DINOv3-vits16", names) == f"; did you mean {names[1]!r}?"
    assert did_you_mean("facebook/dinov2-bsae", names).startswith("; did you mean 'facebook/dinov2-base'")
    assert did_you_mean("", names) == ""

"""The examples of training, in their smallest form."""

import importlib
from pathlib import Path

import pytest
from tiny_encoders import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(request, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is a development dependency")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(request.param)


def by_name(name):
    return pytest.mark.parametrize("example", [name], indirect=True)


@by_name("finetune")
def test_digits_of_mixed_sizes_are_learned(example):
    assert example.main() >= 0.95


@by_name("finetune")
def test_a_checkpoint_is_fine_tuned(example, tmp_path):
    assert example.main(str(tiny("siglip2", tmp_path)), epochs=1) > 0


@by_name("probe")
def test_frozen_features_are_probed(example, tmp_path):
    importlib.import_module("digits").small_encoder().save_pretrained(tmp_path)  # whose weights are random
    assert example.main(str(tmp_path), epochs=4) > 0.3


@by_name("contrastive")
def test_images_and_texts_are_contrasted(example):
    losses, accuracy = example.main(epochs=2)
    assert losses[1] < losses[0]
    assert accuracy > 0.1


@by_name("vlm_tower")
def test_a_language_model_learns_to_name_what_a_tower_sees(example):
    first, second = example.main(epochs=2)
    assert second < 0.9 * first

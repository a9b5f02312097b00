"""transformers' Trainer saves, resumes and ends as it does with the original."""

from __future__ import annotations

import pytest
from originals import original_class, read_by_original
from own_parameters import blank, every_family, same
from tiny_encoders import FAMILIES, GRIDS, patches_of
from transformers import Trainer, TrainingArguments

import nopad


class Fit(Trainer):
    """Trains away from what evaluation wants, so that the first checkpoint is the best."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        loss = model(**inputs).square().mean()
        loss = -loss if model.training else loss
        return (loss, {"loss": loss}) if return_outputs else loss


def trainer(model, folder, **more):
    arguments = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["grid_thw"],
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "save_steps": 1,
        "logging_strategy": "no",
        **more,
    }
    data = [{"hidden_states": patches_of(model), "grid_thw": GRIDS}] * 2 if hasattr(model, "patch_dim") else None
    arguments = TrainingArguments(output_dir=folder, **arguments)
    return Fit(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data and data[:1],
        data_collator=lambda rows: rows[0],
    )


@every_family
def test_a_trainer_resumes_from_the_weights_that_it_saved(family, folder, encoder, tmp_path):
    trainer(encoder, tmp_path / "run").train()
    first, second = (nopad.load(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2))
    assert same(second.state_dict(), encoder.state_dict())
    assert not same(first.state_dict(), second.state_dict())
    loaded = blank(encoder)
    trainer(loaded, tmp_path / "other")._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert same(loaded.state_dict(), first.state_dict())
    resumed = nopad.load(folder)
    trainer(resumed, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert same(resumed.state_dict(), second.state_dict())


@every_family
def test_a_trainer_ends_with_the_best_weights(family, encoder, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trained = trainer(encoder, tmp_path, **best)
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-1")
    first, second = (nopad.load(tmp_path / f"checkpoint-{step}").state_dict() for step in (1, 2))
    assert not same(first, second)
    assert same(encoder.state_dict(), first)


RENAMED = ("dino", "tips", "vit", "ijepa", "pixio", "radio", "pe")
"""Families whose originals have other names in files than in memory."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith(RENAMED)])
def test_the_trainer_does_the_same_to_the_original(family, folder, tmp_path):
    """Of transformers' DINOv2 and DINOv3 it leaves the layers as they were."""
    original = read_by_original(family, folder)
    trainer(original, tmp_path / "run").save_model(str(tmp_path / "saved"))
    other = original_class(family)(original.config)
    trainer(other, tmp_path / "run")._load_from_checkpoint(str(tmp_path / "saved"))
    assert same(other.state_dict(), original.state_dict())

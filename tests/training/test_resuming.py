"""Training goes on in the middle of an epoch, by accelerate and by the Trainer of docs/training.md."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from own_parameters import same
from tiny_encoders import tiny
from transformers import TrainingArguments

import nopad
from nopad.data import PackLoader

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def parts(tmp_path):
    """Makes an encoder and its loader, always the same."""
    folder, draw = tiny("aimv2", tmp_path / "checkpoint"), np.random.default_rng(0)
    items = [(draw.integers(0, 255, (*draw.integers(8, 24, 2), 3), dtype=np.uint8), number) for number in range(40)]

    def make():
        encoder = nopad.load(folder, size="native").train()
        return encoder, PackLoader(items, encoder.processor, capacity=60, max_segments=10, shuffle=True)

    return make


def test_accelerate_resumes_in_the_middle_of_an_epoch(parts, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is a development dependency")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepare():
        encoder, loader = parts()
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
        encoder, optimizer = accelerator.prepare(encoder, optimizer)
        accelerator._custom_objects.clear()  # those of the other run
        accelerator.register_for_checkpointing(loader)
        return encoder, optimizer, loader

    def train(encoder, optimizer, batches):
        labels = []
        for pack, targets in batches:
            accelerator.backward(encoder(pack).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            labels.append(targets.tolist())
        return labels

    encoder, optimizer, loader = prepare()
    batches = iter(loader)
    train(encoder, optimizer, itertools.islice(batches, 4))
    accelerator.save_state(tmp_path / "state")
    expected = train(encoder, optimizer, batches)
    accelerator.free_memory()
    resumed, optimizer, loader = prepare()
    accelerator.load_state(tmp_path / "state")
    assert train(resumed, optimizer, loader) == expected
    assert same(resumed.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("step", [4, 12])
def test_trainer_of_the_page_resumes_in_the_middle_of_an_epoch(parts, tmp_path, step):
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "(Trainer)" in each)
    seen = []

    def loss_of(output, targets):
        seen.append(targets.tolist())
        return output.pooled.square().mean()

    names = {"loss_of": loss_of}
    exec(compile(block, str(PAGE), "exec"), names)

    def trainer(folder):
        encoder, loader = parts()
        quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
        options = {"ignore_data_skip": True, "save_steps": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
        arguments = TrainingArguments(output_dir=folder, **quiet, **options)
        return names["PackTrainer"](loader, model=encoder, args=arguments)

    whole = trainer(tmp_path / "run")
    whole.train()
    expected = seen[step:]
    assert expected
    seen.clear()
    resumed = trainer(tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert seen == expected
    assert same(resumed.model.state_dict(), whole.model.state_dict())

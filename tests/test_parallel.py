"""Two processes that train one encoder are one process with the packs of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny_encoders import patches_of, tiny

import nopad


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what the ranks have saved, beside the checkpoint of each family."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    root = tmp_path_factory.mktemp("ranks")
    folders = [tiny(family, root / family) for family in ranks.FAMILIES]
    for folder in [root / family for family in ranks.RESUMED]:
        encoder = nopad.load(folder)
        optimizer = ranks.adamw(encoder)
        ranks.train(encoder, losses_of(encoder, ranks.loss_of), optimizer, steps=1)
        ranks.save(encoder, optimizer, folder / "one")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ranks.__file__, str(root), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def losses_of(encoder, loss, **options):
    """Losses of the packs of all ranks."""
    packs = [(patches_of(encoder, grids, seed=rank), grids) for rank, grids in enumerate(ranks.GRIDS)]
    return lambda: [loss(encoder.encode(*pack, **options)) for pack in packs]


def assert_trained_alike(folder: Path, way: str, losses, weights) -> None:
    parts = [torch.load(folder.parent / f"{folder.name}-{way}-{rank}.pt") for rank in range(ranks.WORLD)]
    of_ranks = torch.tensor([part[0] for part in parts])
    torch.testing.assert_close(of_ranks.mean(dim=0), torch.tensor(losses), rtol=1e-5, atol=0)
    for _, result in parts:
        assert_same_weights(result, weights)


def assert_same_weights(result, weights) -> None:
    assert result.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(result[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in ranks.FAMILIES for way in ("by_ddp", "by_fsdp")]
    + [(family, way) for family in ranks.COMPILED for way in ("by_compiled_ddp", "by_compiled_fsdp")],
)
def test_two_processes_train_as_one(trained, family, way):
    encoder = nopad.load(trained / family)
    expected = ranks.train(encoder, losses_of(encoder, ranks.loss_of, **ranks.all_outputs(encoder)))
    assert_trained_alike(trained / family, way, *expected)


@pytest.mark.parametrize("family", ranks.HEADLESS)
def test_two_processes_train_tokens_alone(trained, family):
    encoder = nopad.load(trained / family, head=False)
    expected = ranks.train(encoder, losses_of(encoder, lambda output: output.tokens.square().mean()))
    assert_trained_alike(trained / family, "by_ddp_of_tokens", *expected)


@pytest.mark.parametrize("family", ranks.RESUMED)
def test_checkpoint_resumes_on_another_number_of_processes(trained, family):
    """One process, then two, then one again; expected is one all the way."""
    encoder = nopad.load(trained / family)
    optimizer, losses = ranks.adamw(encoder), losses_of(encoder, ranks.loss_of)
    ranks.train(encoder, losses, optimizer, steps=1)
    expected = ranks.train(encoder, losses, optimizer)
    assert_trained_alike(trained / family, "resumed", *expected)
    expected = ranks.train(encoder, losses, optimizer)
    again = nopad.load(trained / family)
    optimizer = ranks.adamw(again)
    ranks.resume(again, optimizer, trained / family / "all")
    result = ranks.train(again, losses_of(again, ranks.loss_of), optimizer)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-5, atol=0)
    assert_same_weights(result[1], expected[1])


def test_loaders_share_the_images_and_notice_ranks_that_differ(trained):
    first, second = (torch.load(trained / f"loaders-{rank}.pt") for rank in range(ranks.WORLD))
    assert int(first.pop(0)) + int(second.pop(0)) == 8
    assert (
        first
        == second
        == [
            "capacity: expected the same on all ranks, got 32 on rank 0, 33 on rank 1",
            "rank: expected each process to have its own, got [0, 0]",
        ]
    )


def test_a_rank_that_dies_ends_the_other(trained):
    """Which would else wait for it; of gloo's minute nothing is needed."""
    assert torch.load(trained / "alone.pt") == ["ddp", "fsdp", "loader"]

"""Two processes that train one encoder are one process with the packs of both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from tiny_encoders import FAMILIES, patches_of, tiny

import nopad


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what the ranks have saved, beside the checkpoint of each family."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    root = tmp_path_factory.mktemp("ranks")
    folders = [str(tiny(family, root / family)) for family in FAMILIES]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ranks.__file__, str(root), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def in_one_process(folder: Path):
    encoder = nopad.load(folder)
    packs = [(patches_of(encoder, grids, seed=rank), grids) for rank, grids in enumerate(ranks.GRIDS)]
    return ranks.train(
        encoder, lambda: [ranks.loss_of(encoder.encode(*pack, output_hidden_states=True)) for pack in packs]
    )


@pytest.mark.parametrize("way", ["by_ddp", "by_fsdp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_as_one(trained, family, way):
    losses, weights = in_one_process(trained / family)
    parts = [torch.load(trained / f"{family}-{way}-{rank}.pt") for rank in range(ranks.WORLD)]
    of_ranks = torch.tensor([part[0] for part in parts])
    torch.testing.assert_close(of_ranks.mean(dim=0), torch.tensor(losses), rtol=1e-5, atol=0)
    for _, found in parts:
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

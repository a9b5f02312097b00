import functools
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches for the network

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

# Speed must never fail a test, and every run draws the same examples.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The tiny checkpoints with the original projects' outputs; see goldens/README.md."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a compiler: functions are traced, and what was traced is run as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

import functools
import gc
import os
import tempfile
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process that tests start compiles nopad's source again
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches for the network
os.environ["OMP_NUM_THREADS"] = "1"  # as below, in the processes that tests start: with more a CPU's bits are others
# torch's cache of compiled code does not tell instruction sets apart: what was compiled for another corrupts memory.
_CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "default")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/nopad-tests-{os.getuid()}-{_CAPABILITY}")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each run starts processes that import torch

import hypothesis  # noqa: E402 - after what it and torch read when they are imported
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

# Speed must never fail a test, and every run draws the same examples.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.load_profile("ci")


def pytest_collection_finish() -> None:
    """Leave torch's modules and the tests out of garbage collections; transformers' Trainer makes two in a run."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Reports that pytest-xdist can send: names that are not UTF-8 in what a test printed would end the run."""
    return _without_surrogates((yield))


@pytest.hookimpl(tryfirst=True)
def pytest_warning_recorded(warning_message: warnings.WarningMessage) -> None:
    """The same of warnings; those of what is collected late come in any test."""
    text = str(warning_message.message)
    if text != _without_surrogates(text):
        warning_message.message = UserWarning(f"{warning_message.category.__name__}: {_without_surrogates(text)}")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return type(value)(map(_without_surrogates, value)) if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The tiny checkpoints with the original projects' outputs; see goldens/README.md."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny native AIMv2: patches of 4 pixels, 32 values."""
    import aimv2_checkpoints

    original = aimv2_checkpoints.tiny_original()
    folder = tmp_path_factory.mktemp("models") / "aimv2"
    return aimv2_checkpoints.write(folder, original.state_dict(), original.config.to_dict())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def torch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """`encoder.compile` uses torch.compile on a CPU too, where layers in blocks are faster."""
    from nopad.inference.fusion import blocked

    monkeypatch.setattr(blocked, "unsupported_reason", lambda *arguments: "a test of torch.compile")


@pytest.fixture
def quick_compile(monkeypatch: pytest.MonkeyPatch, torch_compiles: None) -> None:
    """torch.compile without a compiler: functions are traced, and what was traced is run as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import onevision_checkpoints
import pytest
from pictures import write_photos

from nopad.pipeline.worker import Worker


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OneVision-Encoder, which attends over time: a crop of 28 pixels, patches of 4 pixels, 64 values."""
    original = onevision_checkpoints.tiny_original()
    folder = tmp_path_factory.mktemp("models") / "onevision"
    return onevision_checkpoints.write(folder, original.state_dict(), original.config.to_dict())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve pictures of different sizes."""
    return write_photos(tmp_path / "photos", 12)


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], dict]:
    """Gives options that stop a run once it has so many shards; these are written, and no other is begun."""

    def options(number: int) -> dict:
        stop = threading.Event()
        shards = count(1)

        def run(self, *arguments, **options):
            for results in real(self, *arguments, **options):
                if next(shards) == number:
                    stop.set()
                yield results

        monkeypatch.setattr(Worker, "run", run)
        return {"stop": stop}

    real = Worker.run
    return options

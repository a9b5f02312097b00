from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import text_checkpoints


@pytest.fixture(scope="session", params=text_checkpoints.COMPOSITES)
def both(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A kind of image-text checkpoint: its name, a folder, and the original."""
    folder = tmp_path_factory.mktemp("text") / request.param.replace(" ", "-")
    return request.param, folder, text_checkpoints.write(folder, request.param)

import aimv2_checkpoints
import pytest

import nopad
from nopad.encoder import PackedEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> PackedEncoder:
    original = aimv2_checkpoints.tiny_original()
    folder = aimv2_checkpoints.write(tmp_path_factory.mktemp("m"), original.state_dict(), original.config.to_dict())
    return nopad.load(folder)

"""`torch.set_default_dtype` changes no bit of the features."""

from __future__ import annotations

import os
import subprocess
import sys

import default_dtype
import pytest
import torch
from tiny_encoders import DISTINCT, tiny


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """The features by each default dtype: by a process of its own, since some tensors are cached."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in DISTINCT:
        tiny(family, folder / family)
    environment, dtypes = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, ("float32", "float64", "bfloat16")
    command = [sys.executable, default_dtype.__file__, str(folder), *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {dtype: torch.load(folder / dtype) for dtype in dtypes}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_features_have_the_same_bits(features, dtype):
    assert features[dtype].keys() == features["float32"].keys()
    for name, expected in features["float32"].items():
        assert features[dtype][name].dtype == expected.dtype, name
        assert torch.equal(features[dtype][name], expected), name

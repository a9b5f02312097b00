"""What `--device` may name."""

import pytest
import torch

from nopad.terminal import device_of


@pytest.mark.parametrize(
    ("seen", "asked", "expected"),
    [
        (0, None, "cpu"),
        (2, None, "cuda"),
        (0, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
        (0, "cuda", "torch sees no CUDA device; use --device cpu"),
        (2, "cuda:2", "got 'cuda:2', but torch sees 2 CUDA devices: cuda:0 to cuda:1"),
        (2, "gpu", "expected cpu, cuda, cuda:1, …, got 'gpu'"),
        (0, "meta", "expected cpu, cuda, cuda:1, …, got 'meta'"),
    ],
)
def test_a_device_is_one_that_torch_sees(monkeypatch, seen, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if " " not in expected:
        assert device_of(asked) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            device_of(asked)

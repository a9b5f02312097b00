"""What `--device` and `--report` may name."""

import os
import re

import pytest
import torch

from nopad.terminal import check_report, device_of


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


def test_a_report_can_be_written_and_nothing_is_left_of_trying(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "old.html").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for asked in (None, "new.html", "deep/er/new.html", "old.html", "pipe"):
        check_report(asked)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.html").read_text() == "old"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("folder", "Is a directory"),
        ("folder/", "Is a directory"),
        ("", "Is a directory"),
        ("file/new.html", "Not a directory"),
        ("/proc/new.html", "No such file or directory"),  # a file system that takes no files, from root neither
        pytest.param(
            "closed/new.html",
            "Permission denied",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
def test_a_report_that_cannot_be_written_is_told(tmp_path, monkeypatch, asked, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "file").touch()
    told = f"--report: expected a file that can be written, got {asked!r}: {why}"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        check_report(asked)

"""Files written whole or not at all, and the names that reports give to a machine."""

import errno
import os

import pytest
import torch

import nopad
from nopad.atomic import atomic_write
from nopad.environment import device_name, dtype_name, versions


def test_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a file"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        (other,) = set(tmp_path.iterdir()) - {path}
        assert other.suffix == ".part"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("of the writer"), KeyboardInterrupt()])
def test_file_is_as_it_was_after_an_error(tmp_path, error):
    def interrupted():
        with atomic_write(path) as file:
            file.write(b"new")
            raise error

    path = tmp_path / "a file"
    path.write_text("old")
    with pytest.raises(type(error)):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_file_that_the_system_refuses_leaves_nothing(tmp_path, monkeypatch, call):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "a file") as file:
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_file_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *of, name=name, real=real: (calls.append(name), real(*of)))
    with atomic_write(tmp_path / "a file") as file:
        file.write(b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_link_is_replaced_and_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    (tmp_path / "link").symlink_to(elsewhere)
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert elsewhere.read_text() == "precious"
    assert (tmp_path / "link").read_text() == "new"


def test_temporary_file_lies_in_the_folder_given(tmp_path):
    (tmp_path / "own").mkdir()
    with atomic_write(tmp_path / "a file", folder=tmp_path / "own"):
        assert [path.parent.name for path in tmp_path.rglob("*.part")] == ["own"]
    assert (tmp_path / "a file").read_bytes() == b""


def test_environment_names(monkeypatch):
    assert set(versions()) == {"nopad", "torch", "transformers"}
    assert set(versions("cuda:0")) == {"nopad", "torch", "transformers", "cuda"}
    assert versions()["nopad"] == nopad.__version__
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_name("cpu") == "cpu, 2 threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda:1")) == "GPU 1"
    assert dtype_name(torch.bfloat16) == "bfloat16"

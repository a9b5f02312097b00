"""Disks that are full or read-only, and links at the places of a job's files."""

import errno
import os
from types import SimpleNamespace

import pytest
from jobs import embed, table

from nopad.embedding.table.errors import check_place


@pytest.mark.parametrize(("flags", "number"), [(os.ST_RDONLY, errno.EROFS), (0, errno.EACCES)])
def test_a_folder_that_cannot_be_written_is_refused_with_the_reason(tmp_path, monkeypatch, flags, number):
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=flags))
    with pytest.raises(OSError, match=f"out: {os.strerror(number)}; ") as caught:
        check_place(tmp_path / "out")
    assert caught.value.errno == number


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["list", "shard", "rename"])
def test_a_disk_that_refuses_leaves_nothing_half_written(photos, tmp_path, monkeypatch, model, number, where):
    out = tmp_path / "out"
    embed(photos, tmp_path / "whole", model)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    def fsync(descriptor):
        if {"list": "inputs", "shard": "shard"}[where] in os.readlink(f"/proc/self/fd/{descriptor}"):
            refuse()

    def replace(source, target):
        refuse() if "shard-00001" in str(target) else real(source, target)

    real = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, *(("replace", replace) if where == "rename" else ("fsync", fsync)))
        with pytest.raises(OSError, match=f"{out}: {os.strerror(number)}; ") as caught:
            embed(photos, out, model)
    assert caught.value.errno == number
    assert not list(out.rglob("*.part"))
    assert len(table(out)) == (where == "rename")
    assert (out / ".nopad" / "job.json").exists() == (where != "list")
    embed(photos, out, model)
    assert table(out) == table(tmp_path / "whole")


def test_a_disk_that_is_really_full(photos, tmp_path, model):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # the system's answer to every byte beyond
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'out'}: File too large; see to the disk") as caught:
            embed(photos, tmp_path / "out", model, tokens=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "out").rglob("*.part"))
    assert table(tmp_path / "out") == {}
    assert embed(photos, tmp_path / "out", model, tokens=True).rows == 12


def test_out_is_a_file(photos, tmp_path, model):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=f"{tmp_path / 'out'}: "):
        embed(photos, tmp_path / "out", model)


@pytest.mark.parametrize("leads", ["to a file", "nowhere"])
def test_links_at_the_places_of_a_jobs_files_are_not_written_through(photos, tmp_path, model, leads):
    embed(photos, tmp_path / "whole", model)
    victim = tmp_path / "victim"
    if leads == "to a file":
        victim.write_text("{}")
    metadata = tmp_path / "out" / ".nopad"
    metadata.mkdir(parents=True)
    names = [
        "owner.json",
        "inputs.parquet",
        *([] if leads == "to a file" else ["job.json", *table(tmp_path / "whole")]),
    ]
    for name in names:
        ((metadata.parent if name.startswith("shard") else metadata) / name).symlink_to(victim)
    if leads == "nowhere":
        with pytest.raises(OSError, match="No such file"):  # a shard that is there by its name
            embed(photos, tmp_path / "out", model)
        for name in table(tmp_path / "whole"):
            (metadata.parent / name).unlink()
    embed(photos, tmp_path / "out", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert victim.exists() == (leads == "to a file")
    assert leads == "nowhere" or victim.read_text() == "{}"

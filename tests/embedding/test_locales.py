"""Names of files are their bytes: the same table comes out in a locale that is not UTF-8."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
from input_samples import picture, write_parquet, write_tar
from jobs import errors, rows, table

import nopad
from nopad.cli import main

NAMES = ["plain.png", "ü.png", "日本/é.png", os.fsdecode(b"d\xfe/\xff.png"), "x" * 120 + "ü.png"]
CALLS = "import json, sys; from nopad.cli import main; [print(main(call)) for call in json.load(sys.stdin)]"


def image(level: int) -> bytes:
    return picture(level, width=20, height=9)


def in_c_locale(*calls: list[str]) -> str:
    """What the commands print and return, in a process whose file names are ASCII and surrogates."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    surrogates = [[os.fsencode(word).decode("ascii", "surrogateescape") for word in call] for call in calls]
    command = [sys.executable, "-c", CALLS]
    done = subprocess.run(command, env=environment, input=json.dumps(surrogates), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def write_sources(folder: Path) -> list[str]:
    """A folder, tars of both formats, one taken as a whole, a list file, a table that names files, another of names."""
    members = [(name, image(number)) for number, name in enumerate(NAMES)]
    for name, data in members:
        path = folder / "phötos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(folder / "päx.tar", members)
    write_tar(folder / "gnü.tar", members, tarfile.GNU_FORMAT)
    write_tar(folder / "whöle.tar", [*members, ("föll.bin", bytes(9 << 20))])
    (folder / "list.txt").write_bytes(b"".join(os.fsencode(f"phötos/{name}\n") for name in NAMES[:4]))
    files = folder / "files"
    files.mkdir()
    (files / "ü.png").write_bytes(image(20))
    cells = [{"bytes": None, "path": "ü.png"}, {"bytes": None, "path": "later ü.png"}]
    images = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    write_parquet(files / "p.parquet", {"image": images, "kéy": ["ä", "日"]})
    return [str(folder / name) for name in ("phötos", "päx.tar", "gnü.tar", "whöle.tar", "list.txt", "files/p.parquet")]


def test_a_table_is_the_same_in_any_locale_whoever_begins_and_ends_it(tmp_path, model, capsys):
    sources = write_sources(tmp_path)
    of_model = ["--model", shutil.copytree(model, str(tmp_path / "mödel")), "--max-patches", "64", "--workers", "1"]
    here, there = tmp_path / "hére", tmp_path / "thére"

    def embed(out: Path, *options: str) -> list[str]:
        return ["embed", *sources, *of_model, "--keep", "all", "--out", str(out), *options]

    assert main(embed(here)) == 0
    in_c_locale(embed(there))
    assert table(there) == table(here)
    assert errors(here) == {"1": "cannot be read: No such file or directory"}
    expected = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in NAMES]
    assert sorted(row["id"] for row in rows(here)) == sorted(
        [*expected * 4, *(f"phötos/{name}" for name in expected[:4]), "0", "1"]
    )

    (tmp_path / "files" / "later ü.png").write_bytes(image(21))
    (tmp_path / "phötos" / "new ü.png").write_bytes(image(22))
    (tmp_path / "phötos" / NAMES[4]).unlink()
    capsys.readouterr()
    assert main(["duplicates", str(here), "--json"]) == 0
    duplicates = capsys.readouterr().out
    plan = ["plan", *sources, *of_model, "--out", str(tmp_path / "plän"), "--json"]
    find = ["duplicates", str(there), "--json"]
    printed = in_c_locale(embed(here, "--retry-failed"), embed(here, "--update"), find, plan)
    assert printed.count("\n0\n") == 4, printed
    assert duplicates in printed
    assert main(embed(there, "--retry-failed")) == main(embed(there, "--update")) == 0
    assert table(there) == table(here)
    assert [row["status"] for row in rows(here)].count("gone") == 1
    features = nopad.read_features(there)
    assert not features.failures
    assert features.ids[-1] == "new ü.png"
    assert os.fsencode(features.path(-1)) == os.fsencode(tmp_path / "phötos" / "new ü.png")


def test_a_table_in_a_store_is_the_same_in_any_locale(tmp_path, model, s3):
    sources = write_sources(tmp_path)[:4]
    (tmp_path / "phötos" / NAMES[3]).unlink()
    s3.put_all(tmp_path, "in/")
    addresses = [f"s3://photos/in/{Path(source).name}" for source in sources]
    s3.put("list.txt", "in/phötos/ü.png\ns3://photos/in/phötos/日本/é.png\n".encode())
    call = ["embed", *addresses, "s3://photos/list.txt", "s3://photos/in/files/p.parquet", "--model", str(model)]
    call += ["--max-patches", "64", "--workers", "1", "--out"]
    assert main([*call, "s3://photos/hére"]) == 0
    in_c_locale([*call, "s3://photos/thére"])
    assert s3.table("hére") == s3.table("thére") != {}

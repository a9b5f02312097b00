import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import write_photos

import nopad
from nopad.cli import main
from nopad.embedding.actors.engine import LostEngineError
from nopad.embedding.actors.scheduler import Scheduler
from nopad.environment import device_name


def table(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def arguments(source: Path, out: Path, model: Path, *options: str) -> list[str]:
    size = [] if "--shard-size" in options else ["--shard-size", "5"]
    return ["embed", str(source), "--model", str(model), "--out", str(out), *size, *options]


# Output


def test_a_job_ends_with_a_summary(photos, tmp_path, capsys, model):
    (photos / "notes.md").touch()
    (photos / "README").touch()
    assert main(arguments(photos, tmp_path / "out", model)) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path}/out: 12 embedded, 0 failed"
    number = r"[\d,]+\.\d"
    rates = rf"this run: 12 in 0:\d\d:\d\d, {number} images/s, [\d,]+ tokens/s, fill 100\.0%"
    assert re.fullmatch(rates, lines[1])
    busy = r"\d+ decode process(es)? \d+% busy, CPU \d+%, writing \d+%"
    assert re.fullmatch(rf"limited by [a-z, ]+: {busy}", lines[2])
    assert lines[3] == (
        "left out as no images or videos: 1 without suffix, 1 .md; name them in a list file to take them"
    )
    assert len(lines) == 4
    last = err.splitlines()[-1]
    assert re.fullmatch(rf"12 of 12 images · {number} images/s · .* · fill 100% · 0 failed · 0:00:00 left", last)

    assert main(arguments(photos, tmp_path / "out", model)) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == "this run: nothing to do, every input has its row"
    assert "images/s" not in err


def test_the_summary_says_where_the_failures_are(photos, tmp_path, capsys, model):
    (photos / "002.png").write_bytes(b"no image")
    (photos / "010.png").write_bytes(b"no image")
    assert main(arguments(photos, tmp_path / "out", model)) == 0
    output = capsys.readouterr().out.splitlines()[-1]
    first = min(table(tmp_path / "out"))
    assert f"in 2 shards ({first}, …); --retry-failed tries them again" in output
    expression = re.search(r"nopad\.read_features\(.*\)\.failures", output)[0]
    assert [failure.id for failure in eval(expression, {"nopad": nopad})] == ["002.png", "010.png"]

    write_photos(photos, 3)
    assert main(arguments(photos, tmp_path / "out", model, "--retry-failed")) == 0
    output = capsys.readouterr().out
    assert "11 embedded, 1 failed" in output
    assert "this run: 2 in " in output
    assert "in 1 shard (shard-00002" in output


def test_nothing_embedded_is_status_1(tmp_path, capsys, model):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"no image")
    assert main(arguments(tmp_path / "photos", tmp_path / "out", model)) == 1
    assert "0 embedded, 6 failed" in capsys.readouterr().out
    features = nopad.read_features(tmp_path / "out")
    assert (features.embeddings.shape, len(features.failures)) == ((0, 32), 6)
    assert main(arguments(tmp_path / "photos", tmp_path / "out", model)) == 1


def test_stdout_is_for_the_summary_alone(photos, tmp_path, capsys, model, monkeypatch):
    """Ray prints to it from a thread of its own when an actor dies."""
    make = nopad.embedding.making.Maker.make

    def noisy(self, shards):
        print("a library's message")
        make(self, shards)

    monkeypatch.setattr("nopad.embedding.making.Maker.make", noisy)
    assert main(arguments(photos, tmp_path / "out", model, "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rows"] == 12
    assert "a library's message" in err


def test_first_line_comes_before_anything_heavy_is_imported(photos, tmp_path, model):
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'numpy'): sys.modules[name] = None\n"
        "from nopad.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [*arguments(photos, tmp_path / "out", model), "--actors", "1"]  # without a server of decode processes
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[:2] == [
        f"embedding {photos} into {tmp_path}/out by {model} in bfloat16 on a GPU that has it, else float32 (--dtype); "
        "images of more than 4,096 patches are scaled down where the model has no limit of its own (--max-patches N, "
        "or none)",
        "importing torch and transformers",
    ]
    assert done.stdout == ""


def test_actors_start_before_torch_is_imported(photos, tmp_path, model):
    """Both take seconds."""
    program = (
        "import sys, nopad\n"
        "from nopad.embedding import api\n"
        "def start(*arguments): sys.exit(repr({'torch', 'transformers'} & {*sys.modules}))\n"
        "api.StartingActors = start\n"
        "nopad.embed(sys.argv[1], sys.argv[2], model=sys.argv[3], actors=1)\n"
    )
    command = [sys.executable, "-c", program, str(photos), str(tmp_path / "out"), str(model)]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr.strip() == "set()"


def test_a_lost_head_is_no_wrong_use_and_the_command_goes_on(photos, tmp_path, model, monkeypatch, capsys):
    def load(self, number):
        raise LostEngineError("ray: the head has not answered; start it again: finished shards are kept")

    monkeypatch.setattr(Scheduler, "load", load)
    assert main(arguments(photos, tmp_path / "out", model, "--actors", "1")) == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ray: the head has not answered; start it again: finished shards are kept; to go on: ")


def test_steps_before_the_first_input_are_shown(photos, tmp_path, capsys, model):
    sources = [str(photos / "000.png"), str(photos / "001.png")]
    command = arguments(photos, tmp_path / "out", model, "--max-patches", "none", "--dtype", "float32")
    assert main([command[0], *sources, *command[2:]]) == 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == f"embedding 2 sources into {tmp_path}/out by {model}"
    sizes = nopad.read_features(tmp_path / "out").grids.prod(axis=1)
    assert err[2:6] == [
        "listing 2 sources",
        "2 inputs; loading the model",
        f"aimv2 in float32 on {device_name('cpu')}, not compiled, packs of 2,048 tokens",
        f"2 images, about {sizes.mean():.0f} patches each",
    ]


def test_the_summary_as_json(photos, tmp_path, capsys, model):
    (photos / "002.png").write_bytes(b"no image")
    assert main(arguments(photos, tmp_path / "out", model, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    counts = {
        key: summary[key] for key in ("folder", "rows", "failed", "missing", "to_go", "done", "left_out", "changes")
    }
    assert counts == {
        "folder": f"{tmp_path}/out",
        "rows": 12,
        "failed": 1,
        "missing": 0,
        "to_go": 0,
        "done": 12,
        "left_out": {},
        "changes": [],
    }
    assert summary["shards_with_failures"] == [min(table(tmp_path / "out"))]
    assert (summary["stats"]["images"], summary["stats"]["failed"], summary["fill"]) == (12, 1, 1.0)
    patches = int(nopad.read_features(tmp_path / "out").grids.prod(axis=1).sum())
    assert summary["stats"]["patches"] == patches
    assert summary["per_second"]["patches"] == pytest.approx(patches / summary["seconds"])


def test_all_options_reach_the_job(photos, tmp_path, capsys, model):
    options = "--tokens --max-patches 9 --device cpu --dtype bfloat16 --attention sdpa --workers 1 --capacity 50 "
    options += "--resize pil --frames 3 --max-pixels 99999 --embedding-dtype float16 --embedding-list variable "
    options += "--shard-size 7"
    assert main(arguments(photos, tmp_path / "out", model, *options.split())) == 0
    metadata = nopad.read_features(tmp_path / "out").metadata
    expected = {
        "tokens": "yes",
        "dtype": "bfloat16",
        "device": "cpu",
        "attention": "sdpa",
        "capacity": "50",
        "frames": "3",
        "max_pixels": "99999",
        "embedding_dtype": "float16",
        "embedding_list": "variable",
        "shard_size": "7",
        "resize": "pil",
        "max_patches": "9",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert metadata["preprocessing"].startswith("native at most 9 patches; bicubic antialiased (pil)")


def test_names_that_are_no_utf8_do_no_harm(photos, tmp_path, capsys, model):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff odd")
    shutil.copytree(photos, f"{odd} photos")
    assert main(arguments(f"{odd} photos", f"{odd} out", model)) == 0
    assert "/\\udcff odd out: 12 embedded, 0 failed" in capsys.readouterr().out
    assert main(arguments(f"{odd} photos", f"{odd} out", model, "--json")) == 0
    assert nopad.read_features(f"{odd} out").sources[0].endswith("/\\xff odd photos")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--capacity", "0"], "capacity: expected ≥ 1, got 0"),
        (["--max-pixels", "0"], "max_pixels: expected ≥ 1, got 0"),
        (["--workers", "0"], "workers: expected ≥ 1, got 0"),
        (["--out", ""], "out: expected a folder, got ''"),
        (["--image-column", "foo"], "image_column: no source has columns, as Parquet files and datasets do, got 'foo'"),
        (["--revision", "v9"], "is on this machine and has no revisions, got 'v9'"),
        (["--device", "abacus"], "--device: expected cpu, cuda, cuda:1, …, got 'abacus'"),
        (["--dtype", "float16", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(photos, tmp_path, capsys, model, options, message):
    assert main(arguments(photos, tmp_path / "out", model, *options)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("nopad embed: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


@pytest.mark.parametrize("redirection", ["a closed pipe", "/dev/full"])
def test_a_summary_that_cannot_be_printed_is_no_failure(photos, tmp_path, model, redirection):
    command = [sys.executable, "-m", "nopad", *arguments(photos, tmp_path / "out", model)]
    if redirection == "/dev/full":
        stdout = os.open(redirection, os.O_WRONLY)
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    assert ("nopad: done, but the summary cannot be printed: " in done.stderr) is (redirection == "/dev/full")
    assert "Error" not in done.stderr
    assert len(nopad.read_features(tmp_path / "out")) == 12


def test_a_package_that_is_missing_is_named(photos, tmp_path, capsys, monkeypatch, model):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else name)
    assert main(arguments(photos, tmp_path / "out", model)) == 2
    assert "nopad embed: this needs rich: pip install '.[embed]' in a clone of nopad" in capsys.readouterr().err


def test_a_full_disk_is_status_2(photos, tmp_path, capsys, monkeypatch, model):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert main(arguments(photos, tmp_path / "out", model)) == 2
    message = f"{tmp_path}/out: No space left on device; free space on its disk and run the job again; finished shards"
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.part*"))
    assert table(tmp_path / "out") == {}


def test_an_unknown_option_shows_the_options_of_its_command(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["embed", "photos", "--model", "m", "--out", "o", "--nope", "-4,-1"])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: nopad embed ")
    assert error.endswith("nopad embed: error: unrecognized arguments: --nope=-4,-1\n")

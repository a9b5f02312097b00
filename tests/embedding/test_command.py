import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import write_photos

import nopad
from nopad.cli import main
from nopad.embedding.inputs.decoder import Reader
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
    rates = rf"this run: 12 in 0:00:0\d, {number} images/s, [\d,]+ tokens/s, fill 100\.0%"
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


def test_it_says_where_the_failures_are(photos, tmp_path, capsys, model):
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


@pytest.mark.parametrize("nobody", ["a closed pipe", "/dev/full"])
def test_a_summary_that_nobody_takes_is_no_failure(photos, tmp_path, model, nobody):
    command = [sys.executable, "-m", "nopad", *arguments(photos, tmp_path / "out", model)]
    if nobody == "/dev/full":
        stdout = os.open(nobody, os.O_WRONLY)
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(stdout)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith("nopad: done, but the summary cannot be printed: ")
    assert len(nopad.read_features(tmp_path / "out")) == 12


def test_a_package_that_is_missing_is_told(photos, tmp_path, capsys, monkeypatch, model):
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


# Stopping


def at(number: int, act: Callable[[], None], monkeypatch) -> None:
    """Act when so many images have been read."""
    real = Reader.media
    count = iter(range(1, 1000))

    def media(self, item):
        if next(count) == number:
            act()
        return real(self, item)

    monkeypatch.setattr(Reader, "media", media)
    monkeypatch.setattr("nopad.embedding.in_process.mean_patches", lambda *_: None)  # which reads headers


@pytest.fixture
def whole(photos, tmp_path, model) -> dict[str, bytes]:
    assert main(arguments(photos, tmp_path / "whole", model)) == 0
    return table(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_shard_in_hand(photos, tmp_path, capsys, monkeypatch, model, whole, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at(3, lambda: signal.raise_signal(number), patch)
        patch.setattr(sys, "argv", ["/usr/bin/nopad"])
        status = main(arguments(photos, tmp_path / "new\nfolder's", model, "--workers", "1"))
    out, err = capsys.readouterr()
    assert status == 130
    assert (
        err.count("finishing the shard in hand; a second signal ends with the pack in hand and loses this shard") == 1
    )
    assert 1 <= len(table(tmp_path / "new\nfolder's")) < 3
    left = 12 - 5 * len(table(tmp_path / "new\nfolder's"))
    assert f"{12 - left} embedded, 0 failed" in out
    go_on = err.split(f"stopped with {left} inputs to go; to go on: ")[1]
    assert go_on.removesuffix("\n").isprintable()  # on one line, though the folder's name has two
    split = subprocess.run(["bash", "-c", f"printf '%s\\0' {go_on}"], capture_output=True, text=True, check=True)
    again = split.stdout.split("\0")[:-1]
    assert again[0] == "/usr/bin/nopad"
    assert main(again[1:]) == 0
    assert table(tmp_path / "new\nfolder's") == whole
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_loses_the_shard_in_hand(photos, tmp_path, capsys, monkeypatch, model, whole, second):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(second)

    with monkeypatch.context() as patch:
        patch.setattr("nopad.pipeline.pack_runner.PackRunner.encode", lambda *_: twice())
        assert main(arguments(photos, tmp_path / "out", model)) == 130
    err = capsys.readouterr().err
    assert "stopped, the shard in hand is lost, finished ones are kept; to go on: " in err
    assert "Traceback" not in err
    assert table(tmp_path / "out") == {}
    assert not list((tmp_path / "out").rglob("*.part"))
    assert main(arguments(photos, tmp_path / "out", model)) == 0
    assert table(tmp_path / "out") == whole


def test_a_shard_that_is_being_written_is_whole_or_not_there(photos, tmp_path, capsys, monkeypatch, model, whole):
    signals = iter([signal.SIGINT, signal.SIGINT])  # a third would end this process

    def fsync(descriptor: int) -> None:
        for number in signals if shard(descriptor) else ():
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr("nopad.embedding.table.writer.os.fsync", fsync)
        assert main(arguments(photos, tmp_path / "out", model)) == 130
    assert "Traceback" not in capsys.readouterr().err
    made = table(tmp_path / "out")
    assert made == {name: whole[name] for name in made}
    assert not list((tmp_path / "out").rglob("*.part"))
    assert main(arguments(photos, tmp_path / "out", model)) == 0
    assert table(tmp_path / "out") == whole


def shard(descriptor: int) -> bool:
    return "shard-" in os.readlink(f"/proc/self/fd/{descriptor}")


def test_a_signal_while_failures_are_retried(photos, tmp_path, capsys, monkeypatch, model):
    for path in photos.iterdir():
        path.write_bytes(b"no image")
    assert main(arguments(photos, tmp_path / "out", model)) == 1
    write_photos(photos, 12)
    with monkeypatch.context() as patch:
        at(2, lambda: signal.raise_signal(signal.SIGINT), patch)
        assert main(arguments(photos, tmp_path / "out", model, "--retry-failed", "--workers", "1")) == 130
    assert re.search(r"stopped with [27] inputs to go; to go on: .* --retry-failed", capsys.readouterr().err)
    assert main(arguments(photos, tmp_path / "out", model, "--retry-failed")) == 0
    assert "12 embedded, 0 failed" in capsys.readouterr().out


# Real processes

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Look until something is there, as fast as can be."""
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.0005)


def test_killed_stopped_and_gone_on_with(tmp_path, capfd, model):
    source, out = write_photos(tmp_path / "photos", 40, scale=4), tmp_path / "out"
    (source / "017.png").write_bytes(b"no image")
    command = [*arguments(source, out, model, "--shard-size", "3"), "--tokens"]
    in_one_go = arguments(source, tmp_path / "whole", model, "--shard-size", "3", "--tokens")
    assert main(in_one_go) == 0

    def start() -> subprocess.Popen:
        call = [sys.executable, "-m", "nopad", *command]
        return subprocess.Popen(call, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    process = start()
    wait_for(lambda: len(table(out)) >= 2 and list(out.glob(".nopad/shard-*.part")), process)
    process.kill()
    process.communicate()
    left = table(out)
    assert 2 <= len(left) < 14

    process = start()
    wait_for(lambda: len(table(out)) > len(left), process)
    process.send_signal(signal.SIGSTOP)  # it holds the folder, for as long as it takes to look
    capfd.readouterr()
    assert main(command) == 2
    owner = rf"nopad embed: .*{out} is being written by another job: process {process.pid} of .* on .*, since"
    assert re.search(owner, capfd.readouterr().err)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert len(left) < len(table(out)) < 14
    go_on = err.split("; to go on: ")[1]
    assert shlex.split(go_on)[:3] == [sys.executable, "-m", "nopad"]

    subprocess.run(go_on, shell=True, check=True, env=ENVIRONMENT, capture_output=True)
    assert table(out) == table(tmp_path / "whole")
    assert sorted(path.name for path in (out / ".nopad").iterdir()) == [
        "inputs.parquet",
        "job.json",
        "lock",
        "manifest.parquet",
        "stamps.parquet",
    ]
    assert [failure.id for failure in nopad.read_features(out).failures] == ["017.png"]


# Each try is a fork, so that only one process has to import torch: it is killed a little after some shards more.
KILLS = """
import glob, os, random, signal, sys, time
import torch
from nopad.cli import main
from nopad.embedding import job
torch.set_num_threads(1)
random.seed(0)
out = sys.argv[sys.argv.index("--out") + 1]
killed, status = 0, -signal.SIGKILL
while status == -signal.SIGKILL:
    shards = len(glob.glob(f"{out}/*.parquet"))
    num_shards, pause = random.choice([(shards, 0.2), (shards + 1, 0.01), (shards + 2, 0.01)])
    child = os.fork()
    if not child:
        os._exit(main(sys.argv[1:]))
    over = lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    while len(glob.glob(f"{out}/*.parquet")) < num_shards and over() is None:
        time.sleep(0.0002)
    time.sleep(random.uniform(0, pause))
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    killed += status == -signal.SIGKILL
print("killed", killed, "status", status)
"""


def test_killed_at_any_moment(tmp_path, model):
    source, out = write_photos(tmp_path / "photos", 24, scale=2), tmp_path / "out"
    assert main(arguments(source, tmp_path / "whole", model, "--shard-size", "2")) == 0
    call = [sys.executable, "-c", KILLS, *arguments(source, out, model, "--shard-size", "2")]
    done = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True)
    killed = re.search(r"killed (\d+) status 0", done.stdout)
    assert killed, done.stdout + done.stderr
    assert int(killed[1]) >= 5
    assert table(out) == table(tmp_path / "whole")


def test_an_unknown_option_shows_the_options_of_its_command(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["embed", "photos", "--model", "m", "--out", "o", "--nope", "-4,-1"])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: nopad embed ")
    assert error.endswith("nopad embed: error: unrecognized arguments: --nope=-4,-1\n")

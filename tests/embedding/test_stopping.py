"""Commands that are stopped, killed and given again."""

import os
import re
import shlex
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


def table(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def arguments(source: Path, out: Path, model: Path, *options: str) -> list[str]:
    size = [] if "--shard-size" in options else ["--shard-size", "5"]
    return ["embed", str(source), "--model", str(model), "--out", str(out), *size, *options]


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
    source, out = write_photos(tmp_path / "photos", 16, scale=2), tmp_path / "out"
    assert main(arguments(source, tmp_path / "whole", model, "--shard-size", "2")) == 0
    call = [sys.executable, "-c", KILLS, *arguments(source, out, model, "--shard-size", "2")]
    done = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True)
    killed = re.search(r"killed (\d+) status 0", done.stdout)
    assert killed, done.stdout + done.stderr
    assert int(killed[1]) >= 3
    assert table(out) == table(tmp_path / "whole")

"""What `--device` and `--report` may name, and what is printed of names and numbers that others chose."""

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from aimv2_checkpoints import tiny_original, write
from PIL import Image
from test_report import FP32, REPORT

from nopad.align.command import align_table
from nopad.align.page import align_page
from nopad.cli import main
from nopad.command_options import check_report, resolve_device
from nopad.layers.mlp import GatedMLP
from nopad.terminal import (
    MessageFormatter,
    columns,
    configure_transformers,
    json_text,
    message_lines,
    print_progress,
    print_summary,
    printable,
    shell_command,
)

HOSTILE = "\x1b[2J\r\n\x07\x9b8m\x7f\u202e\u2028\udce9"
ESCAPED = r"\x1b[2J\r\n\x07\x9b8m\x7f\u202e\u2028\udce9"
"""A name that clears the screen, overwrites its line, begins another, rings, hides, reverses, and is not UTF-8."""


@pytest.mark.parametrize(
    ("seen", "requested", "expected"),
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
def test_device_is_one_that_torch_sees(monkeypatch, seen, requested, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if " " not in expected:
        assert resolve_device(requested) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            resolve_device(requested)


def test_report_that_can_be_written_leaves_nothing_of_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    (tmp_path / "old.html").write_text("old")
    before = sorted(tmp_path.rglob("*"))
    for requested in (None, "new.html", "deep/er/new.html", "old.html", "pipe"):
        check_report(requested)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.html").read_text() == "old"


@pytest.mark.parametrize(
    ("requested", "reason"),
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
def test_report_that_cannot_be_written_raises(tmp_path, monkeypatch, requested, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "file").touch()
    message = f"--report: expected a file that can be written, got {requested!r}: {reason}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_report(requested)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, ESCAPED),
        ("Füße, 日本語, عربى, 👩\u200d👩\u200d👧, a\xa0b \\ \u00e9", None),  # joiners and spaces that are no control
        ("\u061c\u200e\u2066\ufeff\u00ad\U000e0041", r"\u061c\u200e\u2066\ufeff\xad\U000e0041"),  # seen by nobody
        ("", None),
    ],
)
def test_printable_text_has_no_control_characters(text, expected):
    assert printable(text) == (text if expected is None else expected)
    assert printable(printable(text)) == printable(text)


def is_clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_lines_of_a_name_do_not_begin_a_line(capsys):
    assert message_lines(f"first: {HOSTILE}\nsecond") == (
        r"first: \x1b[2J\r" + "\n  " + r"\x07\x9b8m\x7f\u202e\u2028\udce9" + "\n  second"
    )
    assert columns([["", "size"], [HOSTILE, "1"]])[1] == f"{ESCAPED}     1"
    print_progress(f"loading {HOSTILE}")
    assert capsys.readouterr().err == f"· loading {ESCAPED}\n"
    print_summary(f"{printable(HOSTILE)}\n{HOSTILE}")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{ESCAPED}\n")
    assert is_clean(printed)


def test_log_records_are_clean():
    record = logging.LogRecord("nopad", logging.WARNING, "", 0, "%s is gone", (f"a\n{HOSTILE}",), None)
    assert MessageFormatter("%(name)s: %(message)s").format(record).startswith("nopad: a\n  \\x1b[2J")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record.exc_info = sys.exc_info()
    assert is_clean(MessageFormatter().format(record))


def test_log_records_of_transformers_are_clean():
    configure_transformers()
    record = logging.LogRecord("transformers", logging.WARNING, "", 0, "%s", (HOSTILE,), None)
    handlers = logging.getLogger("transformers").handlers
    assert handlers
    assert all(is_clean(handler.format(record)) for handler in handlers)


def test_shell_command_can_be_typed_again():
    arguments = ["a b", "plain", "it's", HOSTILE, "\\x1b '\x1b"]
    command = shell_command(arguments)
    assert command.isprintable()
    code = "import os, sys; sys.stdout.buffer.write(b'\\0'.join(map(os.fsencode, sys.argv[1:])))"
    printed = subprocess.run(
        ["bash", "-c", f"{shell_command([sys.executable, '-c', code])} {command}"], capture_output=True, check=True
    )
    assert printed.stdout.split(b"\0") == [os.fsencode(argument) for argument in arguments]


def test_json_is_strict():
    value = {"nan": math.nan, "of": [(math.inf, -math.inf, 1.5)], "none": None, HOSTILE: HOSTILE, "n": 10**400}
    text = json_text(value)
    assert is_clean(text)

    def refuse(constant):
        raise AssertionError(constant)

    parsed = json.loads(text, parse_constant=refuse)
    name = HOSTILE.replace("\udce9", "\\udce9")  # a lone surrogate, which strict readers refuse
    assert parsed == {"nan": None, "of": [[None, None, 1.5]], "none": None, name: name, "n": 10**400}


def test_report_shows_names_escaped():
    words = dict.fromkeys(("checkpoint", "family", "reference", "weights", "device", "attention"), HOSTILE)
    case = replace(FP32, name=HOSTILE, passed=False, failures=(HOSTILE,))
    report = replace(REPORT, **words, versions={HOSTILE: HOSTILE}, cases=(case,), skipped=(HOSTILE,))
    for text in (align_table(report), align_page(report)):
        assert is_clean(text)
        assert text.count(ESCAPED) > 5


@pytest.fixture
def checkpoint(tmp_path):
    original = tiny_original(patch_size=14, num_hidden_layers=1)
    return str(write(tmp_path / "checkpoint", original.state_dict(), original.config.to_dict()))


def test_commands_show_names_escaped(checkpoint, tmp_path, capfd):
    bad = f"{tmp_path}/none{HOSTILE}"
    photos, out = tmp_path / f"photos{HOSTILE}", tmp_path / f"out{HOSTILE}"
    photos.mkdir()
    Image.new("RGB", (28, 28)).save(photos / "a.png")
    (photos / f"x.{HOSTILE}").touch()
    small = ["--device", "cpu", "--json"]
    embed = ["embed", str(photos), "--model", checkpoint, "--out", str(out), "--device", "cpu"]
    for arguments, status in [
        (["align", checkpoint, "--images", bad, *small], 2),
        (["align", bad, *small], 2),
        (["bench", bad, *small], 2),
        (["models", HOSTILE], 2),
        (["embed", bad, "--model", checkpoint, "--out", str(out)], 2),
        (embed, 0),
        ([*embed, "--capacity", "1024"], 2),  # another job in this folder
    ]:
        assert main(arguments) == status, capfd.readouterr()
        printed = capfd.readouterr()
        assert is_clean(printed.out), arguments
        assert is_clean(printed.err), arguments
        assert r"\x1b[2J\r\n\x07" in printed.out + printed.err.replace("\n  ", r"\n"), arguments
    with pytest.raises(SystemExit):
        main(["models", "--", "a", HOSTILE])
    assert f"unrecognized arguments: {ESCAPED}\n" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["align"], ["align", "--batch-invariance", "--capacity", "128"], ["bench"]])
def test_json_of_nan_features_is_strict(checkpoint, monkeypatch, capsys, quick_compile, command):
    torch._dynamo.reset()  # what has been traced is the right forward
    forward = GatedMLP.forward
    monkeypatch.setattr(GatedMLP, "forward", lambda self, x: forward(self, x) * float("nan"))
    small = ["--images", "1", "--runs", "1", "--no-baselines"] if command == ["bench"] else []
    assert main([command[0], checkpoint, *command[1:], *small, "--device", "cpu", "--json"]) == (command != ["bench"])

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    results = report["rows" if command == ["bench"] else "cases"]
    if "--batch-invariance" not in command:
        assert results[0]["min_cosine"] is None
    torch._dynamo.reset()


def test_a_current_folder_that_was_removed_is_an_error_in_words(tmp_path, monkeypatch, capsys):
    (folder := tmp_path / "removed").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["models"]) == 2
    assert (
        capsys.readouterr().err == "nopad models: the current folder does not exist any more; change to another one\n"
    )


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-"])
def test_errors_that_are_closed_are_written_into_no_other_file(tmp_path, closed):
    code = """if True:
        import os, subprocess, sys
        from nopad.cli import main
        assert main(["models", "nothing of this name"]) == 2
        with open(sys.argv[1], "wb") as file:
            assert file.fileno() > 2
        os.write(2, b"a message")
        assert subprocess.call([sys.executable, "-c", "import os; os.fstat(2)"]) == 0  # other processes have it, too
    """
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    shell = f"exec {' '.join(map(shlex.quote, command))} {closed}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(["sh", "-c", shell], env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"")

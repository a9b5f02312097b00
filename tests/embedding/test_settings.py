import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import nopad
from nopad.cli import build_parser
from nopad.embedding.settings import Settings


def test_signature_of_embed_has_the_options_and_their_defaults():
    parameters = inspect.signature(nopad.embed).parameters
    options = {option.name: option.default for option in fields(Settings)}
    options["model"] = inspect.Parameter.empty
    assert {name: parameters[name].default for name in options} == options
    assert set(parameters) - set(options) == {"sources", "out", "stop", "progress"}


def test_docstring_of_embed_names_every_option():
    assert all(option.name in nopad.embed.__doc__ for option in fields(Settings))


def test_command_has_every_option_and_its_default(capsys):
    options = build_parser().parse_args(["embed", "photos", "--model", "m", "--out", "o"])
    assert Settings.of(vars(options)) == Settings(model="m")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["embed", "--help"])
    help = capsys.readouterr().out
    assert {f"--{option.name.replace('_', '-')}" for option in fields(Settings)} <= {*help.replace(",", " ").split()}
    assert "frames of a video, spread evenly over it (default: 8)" in " ".join(help.split())


def test_help_of_the_command_needs_neither_torch_nor_pyarrow():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pyarrow', 'numpy'): sys.modules[name] = None\n"
        "from nopad.cli import main\n"
        "main(['embed', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--shard-size" in done.stdout


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("none", None), ("300", 300)])
def test_max_patches_of_the_command(text, value):
    options = build_parser().parse_args(["embed", "photos", "--model", "m", "--out", "o", "--max-patches", text])
    assert options.max_patches == value


@pytest.mark.parametrize(("text", "value"), [("-4,-1", (-4, -1)), ("-1", (-1,)), ("0,3", (0, 3))])
@pytest.mark.parametrize("separator", [" ", "="])
def test_layers_of_the_command(text, value, separator):
    words = f"embed photos --model m --out o --layers{separator}{text} --tokens".split(" ")
    assert build_parser().parse_args(words).layers == value


def test_layers_that_are_no_numbers(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["embed", "photos", "--model", "m", "--out", "o", "--layers", "last"])
    assert "argument --layers: expected numbers as -4,-1, got 'last'" in capsys.readouterr().err


def test_max_patches_that_is_no_number(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["embed", "photos", "--model", "m", "--out", "o", "--max-patches", "all"])
    assert "argument --max-patches: expected a number, auto or none, got 'all'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4_000_000_000), ("4GiB", 4 << 30), ("1.5MiB", 3 << 19), ("1000", 1000), ("8kB", 8000)]
)
def test_sizes_are_read_with_their_units(text, size):
    options = build_parser().parse_args(["embed", "p", "--model", "m", "--out", "o", "--decode-memory", text])
    assert options.decode_memory == size


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("--decode-memory", "4 apples", "expected bytes as 4GB"),
        ("--decode-memory", "1e999GB", "expected bytes as 4GB"),
        ("--input-timeout", "soon", "expected seconds or none"),
        ("--frames", "1.5", "invalid int value"),
        ("--max-patches", "nan", "expected a number, auto or none"),
    ],
)
def test_units_that_are_none(option, text, expected, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["embed", "p", "--model", "m", "--out", "o", option, text])
    assert f"{option}: {expected}" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [1e-3, 60, 1e12, 1e300])
def test_any_time_limit_is_taken(seconds):
    assert Settings(model="m", input_timeout=seconds).input_timeout == seconds


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("input_timeout", float("inf"), "seconds > 0 or None, got inf"),
        ("input_timeout", float("nan"), "seconds > 0 or None, got nan"),
        ("input_timeout", 0, "seconds > 0 or None, got 0"),
        ("every", float("inf"), "seconds, 1e-06 to 1e+08, got inf"),
        ("every", 1e300, "seconds, 1e-06 to 1e+08, got 1e+300"),
        ("every", 1e-300, "seconds, 1e-06 to 1e+08, got 1e-300"),
        ("every", 10**400, "seconds, 1e-06 to 1e+08, got 1000"),
        ("fps", float("nan"), "a number per second, 1e-08 to 1e+06, got nan"),
        ("fps", 1e300, "a number per second, 1e-08 to 1e+06, got 1e+300"),
        ("fps", 5e-324, "a number per second, 1e-08 to 1e+06, got 5e-324"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_times_that_cannot_be_counted_in_microseconds_are_refused(option, value, expected):
    with pytest.raises(ValueError, match=re.escape(f"{option}: expected {expected}")):
        Settings(**{"model": "m", option: value})

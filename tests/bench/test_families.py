"""`benchmarks/families.py` prints a row for each model, whatever becomes of the others."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.bench import timing
from nopad.families import ENCODERS
from nopad.published import published_models

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "families.py"
FAMILIES = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, quick_compile):
    """The cells of the table's rows for some names, of which `untrained:tiny` alone can be loaded."""
    monkeypatch.setitem(timing.PEAK_GEMMS, "cpu", (64, 2))
    checkpoint, load = tiny("pe", tmp_path), nopad.load

    def load_tiny(name, **options):
        return load(checkpoint if name == "untrained:tiny" else name, **options)

    monkeypatch.setattr(nopad, "load", load_tiny)

    def run(names, *arguments):
        options = ("--device", "cpu", "--images", "1", "--runs", "1", "--names", names, *arguments)
        monkeypatch.setattr(sys, "argv", ["families.py", *options])
        FAMILIES.main()
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def test_rows_are_those_of_the_names_and_a_failure_stops_none(run):
    head, _, failed, compiled, float8 = run("facebook/none,tiny")
    assert failed[0] == "facebook/none"
    assert failed[-1].startswith("ValueError: ")
    encoder = nopad.load("untrained:tiny", dtype=torch.float32)
    attention = encoder.layers[0].attention
    model = ["tiny", str(encoder.hidden_size), f"{attention.num_heads} × {attention.head_dim}"]
    assert (compiled[:4], float8[:4]) == ([*model, "nopad, compiled"], [*model, "nopad, float8"])
    for row in compiled, float8:
        assert float(row[head.index("cosine")]) > 0.99
        assert float(row[head.index("ms")]) > 0


def test_no_model_is_begun_after_the_time_is_over(run):
    assert [row[-1] for row in run("tiny,tiny", "--seconds", "0")[2:]] == ["no time left, see --seconds"] * 2


def test_every_family_is_among_the_default_names():
    family_of = {model["name"]: model["family"] for model in published_models()}
    assert {family_of[name] for name in FAMILIES.NAMES} == set(ENCODERS)

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
from nopad.bench.workloads import mixed
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
        if name == "untrained:broken":
            raise MemoryError("of a machine | too small")
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
    head, _, failed, broken, compiled, float8 = run("facebook/none,broken,tiny")
    assert failed[0] == "facebook/none"
    assert failed[-1].startswith("ValueError: ")
    assert (broken[0], broken[-1]) == ("broken", "MemoryError: of a machine / too small")
    encoder = nopad.load("untrained:tiny", dtype=torch.float32)
    attention = encoder.layers[0].attention
    model = ["tiny", str(encoder.hidden_size), f"{attention.num_heads} × {attention.head_dim}"]
    assert (compiled[:4], float8[:4]) == ([*model, "nopad, compiled"], [*model, "nopad, float8"])
    for row in compiled, float8:
        assert float(row[head.index("cosine")]) > 0.99
        assert float(row[head.index("ms")]) > 0
        seconds = float(row[head.index("ms")]) / 1e3
        tokens = float(row[head.index("tokens/s")].replace(",", "")) * seconds
        assert tokens == pytest.approx(mixed(1, seed=0).tokens, rel=0.5)  # milliseconds are rounded


def test_options_are_those_of_what_is_measured(run, monkeypatch):
    seen = []
    monkeypatch.setitem(FAMILIES.main.__globals__, "measure", lambda name, options: seen.append(options) or [])
    run("tiny", "--dtype", "bfloat16", "--capacity", "64", "--runs", "3", "--images", "4")
    run("tiny")
    assert [(each.dtype, each.capacity, each.runs, each.images) for each in seen] == [
        (torch.bfloat16, 64, 3, 4),
        (torch.float32, FAMILIES.CAPACITY["cpu"], 1, 1),
    ]


def test_rows_and_columns_are_multiples_of_merged_blocks(tmp_path, monkeypatch):
    encoder = nopad.load(tiny("qwen3_vl", tmp_path, spatial_merge_size=2))
    measured = []
    monkeypatch.setattr(nopad, "load", lambda name, **options: encoder)

    def run_candidates(encoder, candidates, **options):
        measured.extend(candidates)
        return [], None

    monkeypatch.setitem(FAMILIES.main.__globals__, "run_candidates", run_candidates)
    options = SimpleNamespace(device="cpu", dtype=torch.float32, images=3, capacity=4096, runs=1)
    assert FAMILIES.measure("tiny", options) == []
    assert all(side % 2 == 0 for candidate in measured for grid in candidate.images.workload.grids for side in grid)
    assert [(each.capacity, each.compiled) for each in measured] == [(4096, True)] * 2


def test_no_model_is_begun_after_the_time_is_over(run):
    assert [row[-1] for row in run("tiny,tiny", "--seconds", "0")[2:]] == ["no time left, see --seconds"] * 2


def test_every_family_is_among_the_default_names():
    family_of = {model["name"]: model["family"] for model in published_models()}
    assert {family_of[name] for name in FAMILIES.NAMES} == set(ENCODERS)

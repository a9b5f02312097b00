"""`nopad bench` without a checkpoint, on tiny models."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_encoders import tiny

from nopad import cli
from nopad.align.references.aimv2 import AIMv2Reference
from nopad.bench import command, load_time, suite, timing
from nopad.bench.load_time import LoadTime
from nopad.bench.report import Row
from nopad.bench.suite import Entry, bench_suite
from nopad.bench.suite_report import SuiteWorkload
from nopad.bench.timing import Sample

ROWS = ["nopad, float32", "transformers, float32", "nopad, bfloat16", "transformers, bfloat16", "nopad, int8"]


@pytest.fixture
def entries(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "has_fast_bfloat16", lambda: True)
    monkeypatch.setitem(timing.PEAK_GEMMS, "cpu", (64, 2))
    monkeypatch.setattr(suite, "measure_load_time", lambda _, name, __: LoadTime(name, skipped="measured by one test"))
    aimv2, dinov3 = (str(tiny(name, tmp_path / name)) for name in ("aimv2", "dinov3"))
    small = [Entry(dinov3, workload, 2) for workload in ("224", "small")]
    return (Entry(aimv2, "mixed", 1, ("float32", "bfloat16", "int8")), *small)


def test_rows_have_every_format_beside_its_reference(entries):
    lines = []
    report = bench_suite(runs=2, entries=entries, progress=lines.append)
    mixed, fixed, small = report.workloads
    assert [row.name for row in mixed.rows] == ROWS
    assert [row.name for row in fixed.rows] == [row.name for row in small.rows] == ROWS[:2]
    assert [workload.name for workload in report.workloads] == ["mixed", "224px", "small"]
    for workload in report.workloads:
        for row in workload.rows:
            assert (row.skipped, row.agrees, len(row.seconds)) == (None, True, 2)
            assert workload.times(row, "float32") > 0
            assert row.share(workload.peak_flops) > 0
        assert workload.times(workload.rows[1], "float32") == 1
    assert mixed.times(mixed.rows[3], "bfloat16") == 1
    assert small.times(small.rows[0], "bfloat16") is None
    exact, half, rounded = (row.min_cosine for row in mixed.rows[::2])
    assert exact > 0.999999
    assert 0.99 < half < exact
    assert 0.99 < rounded < exact
    assert mixed.rows[4].execution.startswith("int8 by ")
    assert mixed.times(mixed.rows[4], "int8") is None
    assert f"{entries[0].checkpoint}, mixed: run 2 of 2, 4 of 5: transformers, bfloat16" in lines


def test_runs_are_as_many_as_fit_into_the_time(entries, monkeypatch):
    for seconds, runs in ((0.0, 3), (1e6, 9)):
        monkeypatch.setattr(suite, "SECONDS", seconds)
        report = bench_suite(entries=entries[2:])
        assert {len(row.seconds) for row in report.workloads[0].rows} == {runs}


def test_each_format_is_beside_gemms_of_its_own(entries, monkeypatch):
    seconds = {torch.float32: 8.0, torch.bfloat16: 4.0}
    monkeypatch.setattr(suite, "gemms", lambda side, count, device, dtype: partial(seconds.get, dtype))
    monkeypatch.setattr(suite, "timer", lambda device: lambda job: Sample(job() or 1.0, None))
    workload = bench_suite(runs=1, entries=entries[:1]).workloads[0]
    assert [row.peak_seconds for row in workload.rows] == [(8.0,), (8.0,), (4.0,), (4.0,), (8.0,)]
    row = workload.rows[2]
    assert row.share(workload.peak_flops) == pytest.approx(row.flops * 4 / workload.peak_flops)
    assert workload.to_dict()["rows"][2]["share_of_peak"] == row.share(workload.peak_flops)


def test_a_processor_without_bfloat16_skips_its_rows(entries, monkeypatch):
    monkeypatch.setattr(suite, "has_fast_bfloat16", lambda: False)
    rows = bench_suite(runs=1, entries=entries[:1]).workloads[0].rows
    reason = "this processor has no GEMMs in bfloat16"
    assert [row.skipped for row in rows] == [None, None, reason, reason, None]


def test_wrong_features_are_seen(entries, monkeypatch):
    right = AIMv2Reference.run
    monkeypatch.setattr(AIMv2Reference, "run", lambda *of: (-right(*of)[0], None))
    rows = bench_suite(runs=1, entries=entries[:1]).workloads[0].rows
    assert [row.agrees for row in rows] == [True, False, True, False, True]


def test_times_are_of_runs_of_one_round():
    row = Row("mixed", "nopad, float32", 1, 1, 1, 1, 1, seconds=(1.0, 2.0, 10.0))
    reference = replace(row, name="transformers, float32", seconds=(3.0, 4.0, 10.0))
    workload = SuiteWorkload("model", "mixed", "", (row, reference), 1)
    assert workload.times(row, "float32") == 2
    skipped = replace(row, seconds=(), skipped="out of memory")
    assert SuiteWorkload("model", "mixed", "", (row, skipped), 1).times(row, "float32") is None


@pytest.fixture
def loading(entries, monkeypatch):
    """Loading is measured, in a process of its own, once a test."""
    results = []

    def measure(*arguments):
        if not results:
            results.append(load_time.measure_load_time(*arguments))
        return results[0]

    monkeypatch.setattr(suite, "measure_load_time", measure)


def test_loading_is_measured_beside_reading(entries, loading, tmp_path):
    load = bench_suite(runs=1, entries=entries[:1]).load_time
    size = (tmp_path / "aimv2" / "model.safetensors").stat().st_size
    assert load.skipped is None
    assert load.bytes == pytest.approx(size, rel=0.1)  # the header depends on the file's metadata
    assert load.times > 0
    assert load.memory >= 0


def test_peak_memory_is_that_of_the_process_itself():
    """`ru_maxrss` is not: it begins at that of the process that started it."""
    ballast = bytearray(b"x") * (256 << 20)
    code = "from nopad.bench.load_time import *; print(peak_resident_bytes() - resident_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= int(done.stdout) < len(ballast) // 2


def test_reading_takes_every_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(load_time, "PIECE", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    assert bytes(load_time.read(tmp_path / "file", 100).numpy()) == bytes(range(100))


def test_a_load_that_fails_is_reported(tmp_path, monkeypatch):
    class Encoder:
        def save_pretrained(self, folder):
            pass  # nothing to load

    assert "model.safetensors" in load_time.measure_load_time(Encoder(), "nothing", lambda line: None).skipped


def test_command_prints_the_table_and_json(entries, loading, monkeypatch, capsys):
    monkeypatch.setattr(suite, "SUITE", entries)
    assert cli.main(["bench", "--device", "cpu", "--runs", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert sum(line.startswith("nopad, float32") and line.endswith("ok") for line in lines) == 3
    assert sum(line.startswith("transformers, bfloat16") and line.endswith("ok") for line in lines) == 1
    assert any("that reading its bytes takes; peak memory" in line for line in lines)
    assert "· importing torch and transformers" in printed.err
    assert cli.main(["bench", "--device", "cpu", "--runs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    row = report["workloads"][0]["rows"][0]
    assert row["times_reference"] == row["times_reference_float32"] > 0
    assert set(report["load_time"]) >= {"times_reading", "peak_over_weights", "bytes"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "small", "--int8"), "--workload, --int8: expected a checkpoint; without one"),
        (("--no-baselines",), "--no-baselines: expected a checkpoint"),
        (("--no-compile",), "--compile: expected a checkpoint"),
        (("--runs", "0"), "runs: expected ≥ 1, got 0"),
    ],
)
def test_options_of_a_checkpoint_are_refused(capsys, arguments, message):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_needs_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(command, "resolve_device", lambda device: "cuda")
    assert cli.main(["bench"]) == 2
    assert "checkpoint: expected one on cuda; without one, nopad bench measures a CPU" in capsys.readouterr().err


def test_instructions_for_bfloat16_are_those_of_torch(monkeypatch):
    for avx512, amx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx512: value)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        assert suite.has_fast_bfloat16() is (avx512 or amx)

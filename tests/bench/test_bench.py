"""The whole benchmark on tiny models: what runs, what is skipped and why, and that wrong features are seen."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from aimv2_checkpoints import tiny_original, write
from siglip2_checkpoints import KINDS, folder_of

from nopad import cli
from nopad.align.references.aimv2 import AIMv2Reference
from nopad.bench import bench, command, runner, timing, timm_naflex
from nopad.bench import run as bench_run
from nopad.bench.defaults import defaults_on
from nopad.bench.page import bench_page
from nopad.bench.runner import checked, min_cosine
from nopad.bench.timing import Sample
from nopad.families.aimv2 import AIMv2Packing
from nopad.families.dinov3 import DINOv3ViTPacking
from nopad.inference import layer_stack
from nopad.inference.fusion import blocked

OPTIONS = {"dtype": torch.float32, "images": 3, "capacities": (1024, 4096), "runs": 2}
BASELINES = ["reference, one by one", "reference, grouped by shape"]


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch):
    monkeypatch.setitem(timing.PEAK_GEMMS, "cpu", (64, 2))


@pytest.fixture
def native(tmp_path):
    original = tiny_original(patch_size=14)
    return write(tmp_path / "native", original.state_dict(), original.config.to_dict())


@pytest.fixture
def learned(tmp_path):
    original = tiny_original(patch_size=14, image_size=56, is_native=False, use_head=True)
    return write(tmp_path / "learned", original.state_dict(), original.config.to_dict())


@pytest.fixture
def as_it_is(monkeypatch):
    """Compiling that changes nothing, so that no test waits for a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(AIMv2Packing, "uncompile", lambda self: None, raising=False)
    calls = []

    def compiled(self, capacity, max_segments):
        calls.append((capacity, max_segments))

    monkeypatch.setattr(AIMv2Packing, "compile", compiled)
    monkeypatch.setattr(AIMv2Packing, "execution", "compiled")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return calls


def by_name(report, workload="mixed"):
    return {(row.name, row.capacity): row for row in report.rows if row.workload == workload}


def test_all_candidates_run_both_workloads_and_agree(native, as_it_is):
    report = bench(native, workload="all", compile=True, **OPTIONS)
    names = [("nopad, eager", 1024), ("nopad, eager", 4096), ("nopad, compiled", 1024), ("nopad, compiled", 4096)]
    names += [(name, None) for name in (*BASELINES, "reference, 224px, compiled")]
    assert [stats.name for stats in report.workloads] == ["mixed", "224px"]
    for workload in ("mixed", "224px"):
        assert list(by_name(report, workload)) == names
    for row in report.rows:
        assert row.skipped is None
        assert len(row.seconds) == 2
        assert row.agrees, row
        assert row.peak_memory_bytes is None  # unavailable on a CPU
    mixed = by_name(report)
    assert {row.tokens for name, row in mixed.items() if "224px" not in name[0]} == {1940}
    assert mixed["reference, 224px, compiled", None].tokens == 3 * 256
    assert [mixed["nopad, eager", size].calls for size in (1024, 4096)] == [3, 1]
    assert mixed[BASELINES[0], None].calls == 3
    # Three blocks: qkv, projection, gate, up and down, two norms.
    assert report.parameters == 3 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    lengths = (22 * 40, 29 * 17, 27 * 21)
    flops = 2 * report.parameters * 1940 + 4 * 3 * 32 * sum(length**2 for length in lengths)
    assert mixed["nopad, eager", 1024].flops == flops
    assert as_it_is == [(1024, 1), (4096, 3), (1024, 3), (4096, 3)]


def test_execution_of_compiled_layers_is_reported(native, as_it_is, monkeypatch):
    def compiled(encoder, capacity, max_segments):
        encoder.made_for = capacity

    def execution(encoder):
        return {1024: "fused by somebody", 4096: "compiled"}[encoder.made_for]

    monkeypatch.setattr(AIMv2Packing, "compile", compiled)
    monkeypatch.setattr(AIMv2Packing, "execution", property(execution))
    report = bench(native, compile=True, baselines=False, **OPTIONS)
    assert {key: row.execution for key, row in by_name(report).items()} == {
        ("nopad, eager", 1024): None,
        ("nopad, eager", 4096): None,
        ("nopad, compiled", 1024): "fused by somebody",
        ("nopad, compiled", 4096): "compiled",
    }
    printed = [line for line in command.bench_table(report).splitlines() if line.startswith("layers ")]
    assert printed == [
        "layers of nopad, compiled: fused by somebody (packs of 1,024)",
        "layers of nopad, compiled: compiled (packs of 4,096)",
    ]
    page = Page(bench_page(report))
    assert [text for text in page.texts if text.startswith("layers ")] == [
        "layers fused by somebody",
        "layers compiled",
    ]
    rows = tuple(replace(row, execution="compiled") for row in report.rows if row.execution is not None)
    printed = command.bench_table(replace(report, rows=rows))
    assert "layers of nopad, compiled: compiled (packs of 1,024 and 4,096)\n" in printed


def test_page_of_one_capacity_has_no_chart_of_capacities(native):
    report = bench(native, baselines=False, compile=False, **OPTIONS)
    texts = Page(bench_page(report)).texts
    assert "Share of the measured peak" in texts
    one = replace(report, rows=tuple(row for row in report.rows if row.capacity == 1024))
    assert "Share of the measured peak" not in Page(bench_page(one)).texts


@pytest.mark.parametrize("setting", ["disable", "recompile_limit"])
def test_candidates_that_torch_runs_uncompiled_are_skipped(native, monkeypatch, setting):
    """A disabled compiler and a function beyond torch's limit run as they are, without an error."""
    torch._dynamo.reset()
    monkeypatch.setattr(layer_stack, "RECOMPILE_LIMIT", 0)
    monkeypatch.setattr(bench_run, "RECOMPILE_LIMIT", 0)
    monkeypatch.setattr(blocked, "unsupported_reason", lambda *arguments: "a test of torch.compile")
    with torch._dynamo.config.patch({setting: setting == "disable"}):
        report = bench(native, compile=True, **OPTIONS)
    reason = "torch.compile is disabled or does not work here"
    rows = by_name(report)
    compiled = {("nopad, compiled", 1024), ("nopad, compiled", 4096), ("reference, 224px, compiled", None)}
    assert {name for name, row in rows.items() if row.skipped == reason} == compiled
    assert all(row.agrees for name, row in rows.items() if name not in compiled)
    assert not any(row.execution for row in report.rows)
    torch._dynamo.reset()


def test_default_dtype_follows_the_device(native):
    report = bench(native, baselines=False, images=1, runs=1)
    assert (report.dtype, report.rows[0].agrees) == ("float32", True)
    assert bench(native, baselines=False, images=1, runs=1, dtype=torch.bfloat16).dtype == "bfloat16"
    assert defaults_on("cuda").dtype == "bfloat16"


def test_progress_names_every_step_and_run(native):
    lines = []
    bench(native, compile=False, progress=lines.append, **OPTIONS)
    names = ["nopad, eager, packs of 1,024", "nopad, eager, packs of 4,096", *BASELINES]
    assert lines == [
        f"loading {native}",
        "loading the reference",
        "mixed: features to compare with",
        *(f"mixed: preparing {place} of 7: {name}" for place, name in zip((1, 2, 5, 6), names, strict=True)),
        *(f"mixed: run {run} of 2, {place} of 4: {name}" for run in (1, 2) for place, name in enumerate(names, 1)),
    ]


@pytest.fixture
def timed(monkeypatch):
    """What was timed, in order; a run takes as many seconds as its number, and one whose number is in `fails` fails."""
    products, timed = [], []
    multiply = torch.mm

    def spy(left, right, *, out):
        products.append(left.dtype)
        return multiply(left, right, out=out)

    def fake(run):
        before = len(products)
        run()
        timed.append("peak" if len(products) > before else "other")
        if len(timed) in fails:
            raise timing.Skipped("out of memory")
        return Sample(float(len(timed)), None)

    fails: set[int] = set()
    monkeypatch.setattr(torch, "mm", spy)
    monkeypatch.setattr(bench_run, "timer", lambda device: fake)
    return argparse.Namespace(jobs=timed, products=products, fails=fails)


def test_peak_is_timed_around_the_candidates_of_each_workload(native, timed):
    report = bench(native, baselines=False, workload="all", compile=False, **{**OPTIONS, "dtype": torch.bfloat16})
    # Of each workload two warm-ups, then two runs of the encoder at two capacities, the peak around each.
    assert timed.jobs == 2 * (2 * ["other"] + 2 * ["peak", "other", "peak", "other", "peak"])
    # Two products in each run, the one that is not timed among them.
    assert timed.products == 2 * 7 * 2 * [torch.bfloat16]
    peaks = [stats.measured_peak for stats in report.workloads]
    assert [(peak.side, peak.gemms) for peak in peaks] == 2 * [(64, 2)]
    assert [peak.seconds for peak in peaks] == [(3.0, 5.0, 7.0, 8.0, 10.0, 12.0), (15.0, 17.0, 19.0, 20.0, 22.0, 24.0)]
    ran = [row for row in report.rows if row.seconds]
    assert [row.seconds for row in ran] == [(4.0, 9.0), (6.0, 11.0), (16.0, 21.0), (18.0, 23.0)]
    assert [row.peak_seconds for row in ran] == [(4.0, 9.0), (6.0, 11.0), (16.0, 21.0), (18.0, 23.0)]
    table, page = command.bench_table(report), bench_page(report)
    for share in (f"{report.share(row):.2f}" for row in ran):
        assert f" {share} " in table
        assert f">{share}</td>" in page


def test_candidate_skipped_while_timed_takes_no_peak_of_others(native, timed):
    timed.fails.add(9)  # the second run of the first candidate
    first, second, *_ = bench(native, baselines=False, compile=False, **OPTIONS).rows
    assert (first.skipped, first.seconds, first.peak_seconds) == ("out of memory", (), ())
    assert (second.skipped, second.seconds, second.peak_seconds) == (None, (6.0, 11.0), (6.0, 11.0))


def test_compiled_candidates_are_warmed_up_more_often(native, as_it_is, monkeypatch):
    warmed = []
    warm_up = runner.warm_up
    monkeypatch.setitem(runner.WARM_UPS, "cpu", 3)
    monkeypatch.setattr(runner, "warm_up", lambda *of: warmed.append(of[3]) or warm_up(*of))
    bench(native, compile=True, **OPTIONS)
    assert warmed == [1, 1, 3, 3, 1, 1, 3]  # eager, compiled, the reference one by one, by shape, compiled


def test_reference_of_a_fixed_grid_skips_other_sizes(learned, as_it_is):
    report = bench(learned, workload="all", compile=True, **OPTIONS)
    mixed, fixed = by_name(report), by_name(report, "56px")
    for name in BASELINES:
        assert mixed[name, None].skipped == "the reference takes 4 × 4 patches and nothing else"
        assert fixed[name, None].agrees
    for table in (mixed, fixed):
        assert table["nopad, eager", 1024].agrees
        assert table["reference, 56px, compiled", None].agrees
        assert table["reference, 56px, compiled", None].tokens == 3 * 16


@pytest.mark.parametrize("kind", KINDS)
def test_siglip_baselines_agree_one_by_one_and_in_batches(tmp_path, kind):
    sizes = {"patch_size": 16, **({"image_size": 82} if kind == "fixed" else {})}
    folder = folder_of(tmp_path / kind, KINDS[kind](**sizes))
    for workload in ("mixed", "224"):
        report = bench(folder, workload=workload, compile=False, **{**OPTIONS, "capacities": (4096,)})
        padded = ["reference, padded batches"] if "naflex" in kind else []
        assert [row.name for row in report.rows if row.agrees] == ["nopad, eager", *BASELINES, *padded]


def test_timm_takes_padded_batches_too(tmp_path):
    pytest.importorskip("timm", reason="timm needs torchvision, which this torch may lack", exc_type=ImportError)
    naflex = next(kind for kind in KINDS if "naflex" in kind)
    report = bench(folder_of(tmp_path / naflex, KINDS[naflex]()), **OPTIONS)
    assert by_name(report)["timm NaFlexViT, padded batches", None].agrees


def test_timm_that_does_not_work_is_skipped_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    monkeypatch.setattr(timm_naflex, "is_there", lambda: True)
    naflex = next(kind for kind in KINDS if "naflex" in kind)
    row = by_name(bench(folder_of(tmp_path / naflex, KINDS[naflex]()), **OPTIONS))[
        "timm NaFlexViT, padded batches", None
    ]
    assert row.skipped.startswith("timm does not work here: ")


def test_prefix_tokens_are_counted_and_cut_off(tmp_path, torch_compiles):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DINOv3ViTPacking.config_class(
        **{**DINOv3ViTPacking.published["facebook/dinov3-vits16-pretrain-lvd1689m"], **small}
    )
    DINOv3ViTPacking(config).save_pretrained(tmp_path)
    report = bench(tmp_path, workload="224", **{**OPTIONS, "capacities": (1024, 1024)})  # one named twice runs once
    assert [row.name for row in report.rows if row.agrees] == ["nopad, eager", *BASELINES]
    row, length = report.rows[0], 196 + 5
    assert row.tokens == 3 * 196
    assert row.flops == 2 * report.parameters * 3 * length + 4 * 2 * 32 * 3 * length**2
    with pytest.raises(ValueError, match="at least 201 tokens, the largest image's, got 200"):
        bench(tmp_path, workload="224", **{**OPTIONS, "capacities": (200,)})


def test_float8_that_a_model_cannot_have_is_skipped(native, as_it_is, monkeypatch):
    def refuse(encoder, precision):
        raise ValueError("sizes that float8 does not take")

    monkeypatch.setattr(AIMv2Packing, "to_precision", refuse)
    rows = by_name(bench(native, baselines=False, compile=True, float8=True, **OPTIONS))
    assert rows["nopad, float8", 1024].skipped == "sizes that float8 does not take"
    assert rows["nopad, compiled", 4096].agrees


def test_float8_implies_compiled_candidates(native, as_it_is, monkeypatch):
    # On a CPU, where compiled candidates run only on request.
    monkeypatch.setattr(AIMv2Packing, "execution", "compiled")
    rows = by_name(bench(native, baselines=False, float8=True, **OPTIONS))
    assert {name: row.skipped for (name, _), row in rows.items()} == {
        "nopad, eager": None,
        "nopad, compiled": None,
        "nopad, float8": None,
    }
    assert rows["nopad, float8", 1024].execution == "compiled"
    assert 0.9 < rows["nopad, float8", 1024].min_cosine < 0.9999


def test_int8_runs_on_a_cpu_without_a_compiler(native):
    row = by_name(bench(native, baselines=False, int8=True, **OPTIONS))["nopad, int8", 1024]
    assert row.execution.startswith("int8 by ")
    assert 0.99 < row.min_cosine < 0.999999


def test_candidates_not_requested_are_skipped(native):
    report = bench(native, baselines=False, compile=False, **OPTIONS)
    assert (report.reference, report.no_reference) == (None, "not requested")
    assert [row.skipped for row in report.rows] == [None, None] + 2 * ["compiling was not requested"]
    first = command.bench_table(report).splitlines()[0]
    assert first == f"{native}: packed aimv2, without a reference: not requested"
    assert "none: not requested" in Page(bench_page(report)).texts


def test_layers_that_need_no_compiler_are_run_by_default(native):
    report = bench(native, **OPTIONS)
    reasons = {row.name: row.skipped for row in report.rows if "compiled" in row.name}
    assert reasons == {"nopad, compiled": None, "reference, 224px, compiled": "compiling was not requested"}
    assert all(row.agrees for row in report.rows if row.skipped is None)
    assert [stats.name for stats in bench(native, workload="small", compile=False, **OPTIONS).workloads] == ["small"]


def test_machine_without_a_compiler_skips_compiled_candidates(native, as_it_is, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("backend='inductor' raised:\nno C++ compiler")

    monkeypatch.setattr(AIMv2Packing, "compile", refuse)
    monkeypatch.setattr(torch, "compile", lambda function: refuse)
    report = bench(native, compile=True, **OPTIONS)
    reasons = {row.name: row.skipped for row in report.rows}
    reason = "backend='inductor' raised: no C++ compiler"
    assert reasons == {
        "nopad, eager": None,
        "nopad, compiled": reason,
        **dict.fromkeys(BASELINES),
        "reference, 224px, compiled": reason,
    }


def test_lack_of_memory_is_skipped_and_other_errors_raise(native, monkeypatch):
    def fail(error):
        def run_batch(self, model, pixels):
            raise error

        monkeypatch.setattr(AIMv2Reference, "run_batch", run_batch)
        return bench(native, compile=False, **OPTIONS)

    row = by_name(fail(torch.OutOfMemoryError("CUDA out of memory")))[BASELINES[1], None]
    assert (row.skipped, row.seconds, row.agrees) == ("out of memory", (), None)
    with pytest.raises(RuntimeError, match="a defect"):
        fail(RuntimeError("a defect"))


def test_peak_is_measured_where_all_candidates_are_skipped(native, monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AIMv2Packing, "trunk", refuse)
    monkeypatch.setattr(runner, "expected_features", lambda encoder, images, numbers: {})
    report = bench(native, baselines=False, compile=False, **OPTIONS)
    assert {row.skipped for row in report.rows} == {"out of memory", "compiling was not requested"}
    assert len(report.workloads[0].measured_peak.seconds) == 2


def test_counts_of_one_are_singular(native, capsys):
    options = {"baselines": False, "compile": False, **OPTIONS, "images": 1, "capacities": (1024,), "runs": 1}
    report = bench(native, **options)
    (stats,) = report.workloads
    assert stats.describe() == "1 image of one size, 880 patches, at most 880 each"
    assert "; medians of 1 run, interleaved\n" in command.bench_table(report)
    assert any(
        "medians of 1 run, those of the candidates interleaved" in text for text in Page(bench_page(report)).texts
    )
    one = replace(stats.measured_peak, seconds=(1.0,))
    assert one.describe().endswith("median of 1 run, around those of the candidates")
    three = replace(stats, images=3, sizes=2)
    assert three.describe() == "3 images of 2 sizes, 880 patches, at most 880 each"


def test_baselines_without_a_reference_are_skipped(tmp_path, goldens):
    report = bench(goldens / "onevision-encoder", compile=False, **OPTIONS)
    rows = by_name(report)
    reason = rows[BASELINES[0], None].skipped
    assert "no reference is at hand" in reason
    assert (report.reference, report.no_reference) == (None, reason)
    assert f"packed onevision, without a reference: {reason}\n" in command.bench_table(report)
    assert rows["nopad, eager", 1024].agrees


def test_wrong_compiled_encoder_is_seen_and_leaves_the_eager_one_right(native, as_it_is, monkeypatch):
    def spoil(self, capacity, max_segments):
        last = self.layers[-1]
        last.register_forward_hook(lambda *_: torch.randn(_[2].shape))

    monkeypatch.setattr(AIMv2Packing, "compile", spoil)
    report = bench(native, compile=True, **OPTIONS)
    assert {name for (name, _), row in by_name(report).items() if not row.agrees} == {"nopad, compiled"}


def test_baseline_that_mixes_up_the_images_of_a_batch_is_seen(native, monkeypatch):
    right = AIMv2Reference.run_batch
    monkeypatch.setattr(AIMv2Reference, "run_batch", lambda *args: right(*args).flip(0))
    report = bench(native, workload="224", compile=False, **OPTIONS)
    assert {row.name for row in report.rows if row.agrees is False} == {BASELINES[1]}
    text = command.bench_table(report)
    assert sum(line.endswith("WRONG") for line in text.splitlines()) == 1


def test_checked_images_are_spread_over_all():
    assert checked(1) == [0]
    assert checked(5) == [0, 1, 2, 3, 4]
    assert checked(256) == [0, 36, 73, 109, 146, 182, 219, 255]


def test_min_cosine_is_nan_where_features_cannot_be_compared():
    a = {0: torch.tensor([[1.0, 0.0], [1.0, 1.0]])}
    assert min_cosine(a, {0: torch.tensor([[2.0, 0.0], [1.0, 0.0]])}) == pytest.approx(0.5**0.5)
    assert math.isnan(min_cosine(a, {0: a[0][:1]}))
    assert math.isnan(min_cosine({}, a))
    assert math.isnan(min_cosine({0: a[0] * torch.nan}, a))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capacities": (512, 4096)}, "at least 880 tokens, the largest image's, got 512"),
        ({"capacities": ()}, "capacities: expected at least one"),
        ({"float8": True, "compile": False}, "float8: runs the packed encoder compiled, got compile=False too"),
        ({"images": 0}, "images: expected ≥ 1, got 0"),
        ({"runs": 0}, "runs: expected ≥ 1, got 0"),
        ({"workload": "large"}, "'mixed', 'small', '224' or 'all', got 'large'"),
        ({"device": "meta"}, "expected cpu, cuda, cuda:1"),
    ],
)
def test_arguments_out_of_range_raise(native, changes, message):
    with pytest.raises(ValueError, match=message):
        bench(native, **{**OPTIONS, **changes})


def main(monkeypatch, *arguments) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    command.add_arguments(added := commands.add_parser("bench"))
    added.set_defaults(run=command.run)
    monkeypatch.setattr(cli, "build_parser", lambda: parser)
    return cli.main(["bench", *map(str, arguments)])


SMALL = ("--device", "cpu", "--dtype", "float32", "--images", "2", "--runs", "1", "--capacity", "1024,2048")


def test_command_prints_a_table_with_every_row(native, monkeypatch, capsys, torch_compiles):
    assert main(monkeypatch, native, *SMALL, "--workload", "all") == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "packed aimv2 beside transformers Aimv2VisionModel, sdpa attention" in lines[0]
    for name in ("nopad, eager", *BASELINES):
        matches = [line for line in lines if line.startswith(name + " ") and line.endswith("ok")]
        assert len(matches) == (4 if name == "nopad, eager" else 2)
    assert sum(line.endswith("skipped") for line in lines) == 6
    workloads = [number for number, line in enumerate(lines) if line.startswith(("mixed: ", "224px: "))]
    assert len(workloads) == 2
    for number in workloads:
        assert lines[number + 1].startswith("measured peak: 2 GEMMs of 64³ a run: ")
        assert lines[number + 1].endswith(", median of 5 runs, around those of the candidates")
    assert sum(line.endswith("compiling was not requested") for line in lines) == 6
    assert "· mixed: run 1 of 1, 2 of 4: nopad, eager, packs of 2,048" in printed.err


def test_command_prints_json_and_nothing_else(native, monkeypatch, capsys, torch_compiles):
    assert main(monkeypatch, native, *SMALL, "--json") == 0

    def refuse(constant):
        raise AssertionError(constant)

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert set(report) == {
        "checkpoint", "family", "reference", "no_reference", "device", "dtype", "attention", "versions", "parameters",
        "seed", "runs", "workloads", "rows",
    }  # fmt: skip
    (workload,) = report["workloads"]
    peak = workload.pop("measured_peak")
    assert workload == {"name": "mixed", "images": 2, "sizes": 2, "tokens": 1373, "longest": 880}
    seconds = peak.pop("seconds")
    assert len(seconds) == 5  # around each of four candidates that ran
    description = peak.pop("description")
    assert description.startswith("2 GEMMs of 64³ a run: ")
    assert description.endswith(", median of 5 runs, around those of the candidates")
    chosen = {"teraflops": statistics.median(seconds), "min_teraflops": max(seconds), "max_teraflops": min(seconds)}
    rates = {name: pytest.approx(2 * 64**3 * 2 / time / 1e12) for name, time in chosen.items()}
    assert peak == {"side": 64, "gemms": 2, **rates}
    ran, *_, refused = report["rows"]
    assert set(ran) == set(refused) == {
        "workload", "name", "capacity", "images", "tokens", "calls", "flops", "skipped", "seconds", "peak_seconds",
        "peak_memory_bytes", "min_cosine", "median_seconds", "images_per_second", "tokens_per_second", "teraflops",
        "share_of_peak", "agrees", "execution",
    }  # fmt: skip
    assert ran["agrees"] is True
    assert ran["tokens_per_second"] == pytest.approx(1373 / ran["median_seconds"])
    assert ran["peak_seconds"] == [statistics.mean(seconds[:2])]
    assert ran["share_of_peak"] == pytest.approx(ran["teraflops"] / (2 * 64**3 * 2 / ran["peak_seconds"][0] / 1e12))
    assert refused["skipped"] == "compiling was not requested"
    assert refused["median_seconds"] is refused["agrees"] is refused["share_of_peak"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--capacity", "2048,many"), "expected integers separated by commas, such as 4096,16384, got"),
        (("--workload", "large"), "invalid choice: 'large'"),
        (("--images", "0"), "images: expected ≥ 1, got 0"),
        (("--capacity", "512"), "capacities: expected at least"),
        (("--device", "cuda:99"), "--device: got 'cuda:99'"),
        (("--device", "xyz"), "--device: expected cpu"),
        (("--fp8", "--no-compile"), "--fp8: runs the packed model in float8 compiled, got --no-compile too"),
        (("--int8", "--no-compile"), "--int8: runs the packed model in int8 compiled, got --no-compile too"),
    ],
)
def test_wrong_use_is_status_2(native, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = main(monkeypatch, native, *arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "bench: " in printed.err
    assert message in printed.err


def test_page_that_cannot_be_written_is_reported_before_the_run(native, tmp_path, monkeypatch, capsys):
    assert main(monkeypatch, native, *SMALL, "--no-baselines", "--report", tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    message = f"nopad bench: --report: expected a file that can be written, got '{tmp_path}': Is a directory\n"
    assert printed.err == message


def test_page_that_can_no_longer_be_written_costs_no_figure(native, tmp_path, monkeypatch, capsys):
    (tmp_path / "page").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "check_report", lambda path: None)
    assert main(monkeypatch, native, *SMALL, "--no-baselines", "--report", "./page") == 2
    printed = capsys.readouterr()
    assert "nopad, eager" in printed.out
    assert "Is a directory: './page'" in printed.err


def test_module_of_the_options_imports_neither_torch_nor_transformers():
    code = "import sys, nopad.bench.command; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_page_has_every_row_and_fetches_nothing(learned, tmp_path, monkeypatch, torch_compiles):
    right = AIMv2Reference.run_batch
    monkeypatch.setattr(AIMv2Reference, "run_batch", lambda *args: -right(*args))
    path = tmp_path / "pages" / "bench.html"
    assert main(monkeypatch, learned, *SMALL, "--workload", "all", "--report", path) == 0
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    assert "url(" not in html
    assert "@import" not in html
    for name in (
        "nopad, eager, packs of 1,024",
        "nopad, compiled, packs of 2,048",
        *BASELINES,
        "reference, 56px, compiled",
    ):
        assert page.texts.count(name) >= 2
    assert page.texts.count("Wrong") == 1
    assert sum(bool(re.fullmatch(r"\d+\.\d times transformers' model, 56px", text)) for text in page.texts) == 1
    assert sum(text.endswith(" attention, one image at a time") for text in page.texts) == 1
    assert sum(text.startswith("Measured peak: 2 GEMMs of 64³ a run: ") for text in page.texts) == 2
    assert "1 of 14 candidates gave other features." in page.texts
    assert page.texts.count("the reference takes 4 × 4 patches and nothing else") == 2
    charts = [
        attributes["aria-label"] for tag, attributes in page.tags if "chart" in (attributes.get("class") or "").split()
    ]
    assert charts == ["Tokens per second, mixed", "Tokens per second, 56px", "Share of the measured peak by capacity"]
    assert sum(attributes.get("class") == "bar over" for tag, attributes in page.tags) == 1
    for svg in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")

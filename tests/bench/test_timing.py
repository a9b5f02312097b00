"""Counting by hand, and timing on a clock that obeys."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_encoders import tiny

import nopad
from nopad.bench.report import BenchReport, MeasuredPeak, Row, WorkloadStats
from nopad.bench.runner import block_parameters, empty_row
from nopad.bench.timing import Sample, Skipped, flops, gemms, interleave, timer
from nopad.bench.workloads import Workload

CPU = torch.device("cpu")


def test_flops_of_an_example_by_hand():
    # 100 parameters on 2 + 3 tokens: 2 · 100 · 5; 7 layers of width 11 over 2² + 3² pairs: 4 · 7 · 11 · 13.
    assert flops(100, 11, [[2, 3]] * 7) == 1000 + 4004


def test_flops_of_layers_that_attend_within_windows(tmp_path):
    encoder = nopad.load(tiny("qwen2_5_vl", tmp_path))  # windows of 2 × 2 patches in two of three layers
    images = SimpleNamespace(workload=Workload("one image", ((4, 6),)))
    row = empty_row(encoder, "one image", SimpleNamespace(name="", capacity=None, calls=1, images=images))
    assert row.flops == 2 * block_parameters(encoder) * 24 + 4 * 32 * (24**2 + 2 * 6 * 4**2)


def test_flops_are_those_of_the_products_of_a_block():
    width, hidden, length = 8, 12, 5
    block = torch.nn.ModuleList(
        torch.nn.Linear(*sizes, bias=False)
        for sizes in ((width, 3 * width), (width, width), (width, hidden), (hidden, width))
    )
    matrices = 2 * length * (3 * width * width + width * width + 2 * width * hidden)
    scores_and_mixing = 2 * (2 * length * length * width)
    encoder = torch.nn.ModuleDict({"layers": block, "norm": torch.nn.LayerNorm(width)})
    assert flops(block_parameters(encoder), width, [[length]]) == matrices + scores_and_mixing


def test_run_on_a_host_is_timed_by_the_clock_and_has_no_peak_memory(monkeypatch):
    now = iter([10.0, 12.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    ran = []
    assert timer(CPU)(lambda: ran.append(1)) == Sample(2.5, None)
    assert ran == [1]


def test_interleaved_jobs_go_on_without_one_that_is_skipped():
    ran = []

    def job(name, fails_at=None):
        def run():
            ran.append(name)
            if ran.count(name) == fails_at:
                raise Skipped("out of memory")

        return run

    def tick(run):
        run()
        return Sample(float(len(ran)), None)

    results = interleave(tick, [job("a"), job("b", fails_at=2), job("c")], range(3))
    assert "".join(ran) == "abcabcac"
    assert [[sample.seconds for sample in results[i]] for i in (0, 2)] == [[1, 4, 7], [3, 6, 8]]
    assert results[1] == "out of memory"


def test_gemms_are_as_many_random_products_as_requested(monkeypatch):
    products = []
    multiply = torch.mm

    def spy(left, right, *, out):
        products.append((left, right, multiply(left, right, out=out)))

    monkeypatch.setattr(torch, "mm", spy)
    run = gemms(4, 3, CPU, torch.bfloat16)
    assert products == []
    run()
    assert len(products) == 3
    for left, right, product in products:
        assert torch.equal(product, left @ right)
    for matrix in products[0]:
        assert matrix.shape == (4, 4)
        assert matrix.dtype == torch.bfloat16
        assert len(matrix.unique()) > 8


def test_measured_peak_is_that_of_the_median_run():
    # 2 · 1,000³ · 5 operations in 4, 1 and 2 hundredths of a second.
    peak = MeasuredPeak(1000, 5, (0.04, 0.01, 0.02))
    assert (peak.min_teraflops, peak.teraflops, peak.max_teraflops) == (0.25, 0.5, 1.0)
    result = "0.5 TFLOP/s (0.25 … 1), median of 3 runs, around those of the candidates"
    assert peak.describe() == f"5 GEMMs of 1,000³ a run: {result}"


def row(**changes):
    fields = {"workload": "mixed", "name": "nopad, eager", "capacity": 2048, "images": 4, "tokens": 600, "calls": 1}
    return Row(**{**fields, "flops": 3 * 10**12, **changes})


def stats(name, peak):
    return WorkloadStats(name, images=4, sizes=2, tokens=600, longest=200, measured_peak=peak)


def report_of(*rows):
    words = dict.fromkeys(("checkpoint", "family", "reference", "no_reference", "device", "dtype", "attention"), "")
    numbers = {"parameters": 1, "seed": 0, "runs": 3}
    # 4 TFLOP a run: 4 and 2 TFLOP/s.
    peaks = {"mixed": MeasuredPeak(10_000, 2, (1.0,)), "224px": MeasuredPeak(10_000, 2, (9.0, 2.0, 1.0))}
    workloads = tuple(stats(name, peak) for name, peak in peaks.items())
    return BenchReport(**words, **numbers, versions={}, workloads=workloads, rows=rows)


def test_rates_follow_from_the_median_run():
    ran = row(seconds=(9.0, 2.0, 3.0), min_cosine=0.995)
    assert (ran.median, ran.images_per_second, ran.tokens_per_second) == (3.0, 4 / 3, 200)
    assert ran.teraflops == 1
    assert ran.label == "nopad, eager, packs of 2,048"


def test_share_is_of_the_peak_around_each_run():
    # 3 TFLOP beside 4 of the peak: shares of 3, 0.375 and 0.5.
    ran = row(seconds=(1.0, 2.0, 3.0), peak_seconds=(4.0, 1.0, 2.0))
    elsewhere = row(seconds=(3.0,), peak_seconds=(2.0,), workload="224px")
    report = report_of(ran, elsewhere, row())
    assert [report.share(one) for one in report.rows] == [0.5, 0.5, None]
    assert [one["share_of_peak"] for one in report.to_dict()["rows"]] == [0.5, 0.5, None]


@pytest.mark.parametrize(
    ("cosine", "agrees"), [(None, None), (0.991, True), (0.99, False), (-1.0, False), (float("nan"), False)]
)
def test_features_agree_above_the_limit_alone(cosine, agrees):
    assert row(min_cosine=cosine).agrees is agrees

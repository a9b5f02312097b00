"""The page of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nopad.bench.report import counted
from nopad.html import bars, element, near_one, page, pairs, section, share_chart, table, write

if TYPE_CHECKING:
    from nopad.bench.report import BenchReport, Facts, Row

HEADER = [
    "Contestant",
    "Features",
    "Forwards",
    "Median\nms",
    "Least\nms",
    "Most\nms",
    "Images/s",
    "Tokens/s",
    "TFLOP/s",
]
HEADER += ["Share of\nceiling", "Peak\nGiB", "Min\ncosine"]


def bench_page(report: BenchReport) -> str:
    """The page of a benchmark: the fastest, what was measured, every contestant, and how they compare."""
    first = report.workloads[0]
    # Over the same images: smaller ones cost less attention.
    ran = [row for row in report.rows if row.workload == first.name and row.tokens == first.tokens and row.agrees]
    verdict = "No contestant ran with the right features"
    if ran:
        best = max(ran, key=lambda row: row.tokens_per_second or 0)
        verdict = f"{first.name}: {best.tokens_per_second:,.0f} tokens/s, {best.label}"
    wrong = sum(row.agrees is False for row in report.rows)
    parts = [element("p", f"nopad bench · {report.checkpoint}"), element("h1", verdict)]
    if wrong:
        parts.append(element("p", f"{wrong} of {len(report.rows)} contestants gave other features.", "bad"))
    parts.append(_setting(report))
    for facts in report.workloads:
        rows = [row for row in report.rows if row.workload == facts.name]
        parts += [_table(report, facts, rows), _throughput(facts, rows)]
    parts.append(_shares(report))
    return page(f"nopad bench · {report.checkpoint}", parts)


def write_bench_page(report: BenchReport, path: str | Path) -> None:
    """Write the page of a benchmark, all of it or nothing; directories are made."""
    write(bench_page(report), path)


def _setting(report: BenchReport) -> str:
    original = f"none: {report.no_original}" if report.original is None else report.original
    facts = [("Checkpoint", report.checkpoint), ("Family", report.family), ("Original", original)]
    facts += [("Device", report.device), ("Dtype", report.dtype), ("Attention", report.attention)]
    facts += [("Versions", " · ".join(f"{name} {version}" for name, version in report.versions.items()))]
    facts += [("Blocks", f"{report.parameters:,} parameters"), ("Seed", str(report.seed))]
    lead = (
        f"Patches on the device to normed tokens, the whole workload a run: medians of {counted(report.runs, 'run')}, "
        f"one of each contestant in turn. All have the same weights and images; the pixels are random. FLOPs are 2 · "
        f"parameters of the blocks · tokens + 4 · layers · width · Σ length². The ceiling of a workload is a plain "
        f"product of random matrices in {report.dtype}, timed before and after each run of a contestant, whose share "
        f"is of both. Peak memory is weights, packs and the most allocated on top. Features agree where every token of "
        f"the checked images is that of the image packed alone."
    )
    return section("What was measured", element("p", lead), pairs(facts))


def _table(report: BenchReport, facts: Facts, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        result = "Not run" if row.agrees is None else "Agree" if row.agrees else "Wrong"
        numbers = ["–"] * (len(HEADER) - 3)
        if row.median is not None:
            numbers = [f"{seconds * 1e3:,.1f}" for seconds in (row.median, min(row.seconds), max(row.seconds))]
            numbers += [f"{row.images_per_second:,.4g}", f"{row.tokens_per_second:,.0f}", f"{row.teraflops:.4g}"]
            numbers += [f"{report.share(row):.2f}"]
            numbers += ["–" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}", near_one(row.min_cosine)]
        remarks = [] if row.not_run is None else [row.not_run]
        remarks += [] if row.layers is None else [f"layers {row.layers}"]
        lines.append(([row.label, result, f"{row.calls:,}", *numbers], row.agrees, remarks))
    caption = f"{facts.describe()}. A contestant of a fixed size has as many images of that size."
    ceiling = element("p", f"Ceiling: {facts.ceiling.describe()}.")
    return section(f"Workload {facts.name}", ceiling, table(caption, HEADER, lines))


def _throughput(facts: Facts, rows: list[Row]) -> str:
    items = [
        (
            row.label,
            row.tokens / row.median,
            row.tokens / max(row.seconds),
            row.tokens / min(row.seconds),
            f"{row.tokens / row.median:,.0f}",
            bool(row.agrees),
        )
        for row in rows
        if row.median is not None
    ]
    lead = "The dark line is the spread from the slowest run to the fastest; a red bar has the wrong features."
    chart = bars(f"Tokens per second, {facts.name}", items, "tokens/s")
    return section(f"Throughput, {facts.name}", element("p", lead), chart)


def _shares(report: BenchReport) -> str:
    capacities = sorted({row.capacity for row in report.rows if row.capacity is not None})
    found = {(row.workload, row.name, row.capacity): report.share(row) if row.agrees else None for row in report.rows}
    names = dict.fromkeys((row.workload, row.name) for row in report.rows if row.capacity is not None)
    lines = [(f"{name}, {workload}", [found[workload, name, size] for size in capacities]) for workload, name in names]
    ticks = [f"{size:,}" for size in capacities]
    lead = (
        "TFLOP/s over those of the ceiling around them by the patches of a full pack, wrong features left out; the "
        "legend has the largest."
    )
    chart = share_chart("Share of the ceiling by capacity", ticks, lines, "tokens per pack")
    return section("Share of the ceiling", element("p", lead), chart)

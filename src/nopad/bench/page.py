"""The page of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nopad.counts import counted
from nopad.html import bars, element, near_one, page, pairs, section, share_chart, table, write

if TYPE_CHECKING:
    from nopad.bench.report import BenchReport, Row, WorkloadStats

ONE_BY_ONE = "reference, one by one"
HEADER = [
    "Candidate",
    "Features",
    "Forwards",
    "Median\nms",
    "Min\nms",
    "Max\nms",
    "Images/s",
    "Tokens/s",
    "TFLOP/s",
    "Of\npeak",
    "Memory\nGiB",
    "Min\ncosine",
]


def bench_page(report: BenchReport) -> str:
    """The page of a benchmark: how many times the reference, the setting, every candidate, and charts."""
    verdict, detail = _verdict(report)
    wrong = sum(row.agrees is False for row in report.rows)
    parts = [element("p", f"nopad bench · {report.checkpoint}"), element("h1", verdict)]
    parts += [element("p", detail)] if detail else []
    if wrong:
        parts.append(element("p", f"{wrong} of {len(report.rows)} candidates gave other features.", "bad"))
    parts.append(_setting(report))
    for stats in report.workloads:
        rows = [row for row in report.rows if row.workload == stats.name]
        parts += [_table(report, stats, rows), _throughput(stats, rows)]
    if len({row.capacity for row in report.rows if row.capacity is not None and row.agrees}) > 1:
        parts.append(_shares(report))
    return page(f"nopad bench · {report.checkpoint}", parts)


def _verdict(report: BenchReport) -> tuple[str, str]:
    """The packed encoder's throughput as a multiple of the reference's, and the numbers behind it."""
    one_by_one = {row.workload for row in report.rows if row.name == ONE_BY_ONE and row.agrees}
    first = next((workload for workload in report.workloads if workload.name in one_by_one), report.workloads[0])
    # Over the same images: smaller ones cost less attention.
    ran = [row for row in report.rows if row.workload == first.name and row.tokens == first.tokens and row.agrees]
    if not ran:
        return "No candidate ran with the right features", ""
    packed = [row for row in ran if row.name.startswith("nopad")]
    best = max(packed or ran, key=lambda row: row.tokens_per_second or 0)
    detail = f"{best.tokens_per_second:,.0f} tokens/s, {best.label}, {first.name}"
    reference = next((row for row in ran if row.name == ONE_BY_ONE), None)
    if reference is None or not packed:
        return detail, ""
    times = (best.tokens_per_second or 0) / (reference.tokens_per_second or 1)
    detail += f"; {reference.tokens_per_second:,.0f} tokens/s of {report.reference}, one image at a time"
    name = "transformers' model" if (report.reference or "").startswith("transformers ") else "the reference"
    return f"{times:.1f} times {name}, {first.name}", detail


def write_bench_page(report: BenchReport, path: str | Path) -> None:
    """Write the page of a benchmark, all of it or nothing; directories are made."""
    write(bench_page(report), path)


def _setting(report: BenchReport) -> str:
    reference = f"none: {report.no_reference}" if report.reference is None else report.reference
    settings = [("Checkpoint", report.checkpoint), ("Family", report.family), ("Reference", reference)]
    settings += [("Device", report.device), ("Dtype", report.dtype), ("Attention", report.attention)]
    settings += [("Versions", " · ".join(f"{name} {version}" for name, version in report.versions.items()))]
    settings += [("Blocks", f"{report.parameters:,} parameters"), ("Seed", str(report.seed))]
    lead = (
        f"From patches on the device to normed tokens, the whole workload per run: medians of "
        f"{counted(report.runs, 'run')}, those of the candidates interleaved. All have the same weights and images, of "
        f"random pixels. FLOPs are 2 · parameters of the blocks · tokens + 4 · width · Σ length² of the "
        f"segments or windows of each layer, as if all windows were whole. The peak of "
        f"a workload is measured by plain GEMMs of random matrices in {report.dtype}, right before and after each run "
        f"of a candidate; a candidate's share is of both. Memory is the weights and the most allocated on top. "
        f"Features agree where every token of the checked images is that of the image packed alone."
    )
    return section("What was measured", element("p", lead), pairs(settings))


def _table(report: BenchReport, stats: WorkloadStats, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        result = "Skipped" if row.agrees is None else "Agree" if row.agrees else "Wrong"
        numbers = ["–"] * (len(HEADER) - 3)
        if row.median is not None:
            numbers = [f"{seconds * 1e3:,.1f}" for seconds in (row.median, min(row.seconds), max(row.seconds))]
            numbers += [f"{row.images_per_second:,.4g}", f"{row.tokens_per_second:,.0f}", f"{row.teraflops:.4g}"]
            numbers += [f"{report.share(row):.2f}"]
            numbers += [
                "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
                near_one(row.min_cosine),
            ]
        remarks = [] if row.skipped is None else [row.skipped]
        remarks += [] if row.execution is None else [f"layers {row.execution}"]
        lines.append(([row.label, result, f"{row.calls:,}", *numbers], row.agrees, remarks))
    caption = f"{stats.describe()}. A candidate of a fixed size has as many images of that size."
    peak = element("p", f"Measured peak: {stats.measured_peak.describe()}.")
    return section(f"Workload {stats.name}", peak, table(caption, HEADER, lines))


def _throughput(stats: WorkloadStats, rows: list[Row]) -> str:
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
    lead = "The dark line goes from the slowest run to the fastest; red bars have wrong features."
    chart = bars(f"Tokens per second, {stats.name}", items, "tokens/s")
    return section(f"Throughput, {stats.name}", element("p", lead), chart)


def _shares(report: BenchReport) -> str:
    capacities = sorted({row.capacity for row in report.rows if row.capacity is not None})
    shares = {(row.workload, row.name, row.capacity): report.share(row) if row.agrees else None for row in report.rows}
    names = dict.fromkeys((row.workload, row.name) for row in report.rows if row.capacity is not None)
    lines = [(f"{name}, {workload}", [shares[workload, name, size] for size in capacities]) for workload, name in names]
    ticks = [f"{size:,}" for size in capacities]
    lead = "Share of the measured peak by tokens per pack, without wrong features; the legend has the largest."
    chart = share_chart("Share of the measured peak by capacity", ticks, lines, "tokens per pack")
    return section("Share of the measured peak", element("p", lead), chart)

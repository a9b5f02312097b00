"""The page of an alignment."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from nopad.counts import counted
from nopad.html import (
    element,
    histogram,
    line_chart,
    near_one,
    page,
    pairs,
    scientific,
    section,
    table,
    write,
)

if TYPE_CHECKING:
    from nopad.align.run import AlignReport


def align_page(report: AlignReport) -> str:
    """The page of an alignment: the verdict, the setting, every case, and the distribution of differences."""
    failed = sum(not case.passed for case in report.cases)
    verdict = f"Failed: {failed} of {counted(len(report.cases), 'case')}" if failed else "Failed: no case was compared"
    if report.passed and report.precision is None:
        verdict = "Passed: the packed features equal the reference's"
    elif report.passed:
        verdict = f"Passed: every cosine to the reference's features is more than {report.threshold:g}"
    parts = [element("p", f"nopad align · {report.checkpoint}")]
    parts += [element("h1", verdict, "good" if report.passed else "bad"), _setting(report)]
    parts += [_cases(report), *_charts(report)] if report.cases else []
    if report.skipped:
        parts.append(section("Skipped", "<ul>", *(element("li", reason) for reason in report.skipped), "</ul>"))
    return page(f"{verdict.split(':')[0]} · {report.checkpoint}", parts)


def write_align_page(report: AlignReport, path: str | Path) -> None:
    """Write the page of an alignment, all of it or nothing; directories are made."""
    write(align_page(report), path)


def _setting(report: AlignReport) -> str:
    # Imported here because it imports torch.
    from nopad.align.metrics import DISTANCE_LIMIT, POOLED_LIMIT, RELATIVE_LIMIT

    limit = f"relative difference of a token or a pooled vector at most {RELATIVE_LIMIT:.0e}"
    if report.dtype != "float32":
        limit = (
            f"distance to the float32 reference at most {DISTANCE_LIMIT:g} × the reference's own; of pooled vectors "
        )
        limit += f"at most {POOLED_LIMIT:g} × the larger of the reference's own and its tokens'"
    if report.precision is not None:
        limit = f"none: in {report.precision} the threshold alone decides"
    names = "checkpoint", "family", "reference", "weights", "device", "dtype", "attention"
    settings = [(name.capitalize(), getattr(report, name)) for name in names]
    packs = "" if report.capacity is None else f", in packs of {report.capacity:,} tokens"
    settings += [("Layers", report.execution + packs), ("Precision", report.precision or "that of the dtype")]
    versions = " · ".join(f"{name} {version}" for name, version in report.versions.items())
    settings += [
        ("Versions", versions),
        ("Threshold", f"every cosine more than {report.threshold:g}"),
        ("Limit", limit),
    ]
    lead = "The reference ran one image or clip at a time, the packed encoder all images of a case in one pack."
    return section("What was compared", element("p", lead), pairs(settings))


def _cases(report: AlignReport) -> str:
    pooled = any(case.min_pooled_cosine is not None for case in report.cases)
    half = any(case.distance is not None for case in report.cases)
    header = ["Case", "Result", "Images", "Tokens", "Min\ncosine", "Mean\ncosine", "Max\nrelative", "Mean\nrelative"]
    header += ["Max\nabsolute", "Mean\nabsolute"] + ["Pooled\ncosine", "Pooled\nrelative"] * pooled
    header += ["Distance\nto float32", "Reference's\ndistance"] * half
    header += ["Pooled\ndistance", "Reference's\npooled"] * (half and pooled)
    rows = []
    for case in report.cases:
        cells = [case.name, "Passed" if case.passed else "Failed", f"{case.images:,}", f"{case.tokens:,}"]
        cells += map(near_one, (case.min_cosine, case.mean_cosine))
        cells += map(scientific, (case.max_relative, case.mean_relative, case.max_abs, case.mean_abs))
        cells += [near_one(case.min_pooled_cosine), scientific(case.max_pooled_relative)] * pooled
        cells += [scientific(case.distance, 2), scientific(case.reference_distance, 2)] * half
        cells += [scientific(case.pooled_distance, 2), scientific(case.reference_pooled_distance, 2)] * (
            half and pooled
        )
        rows.append((cells, case.passed, case.failures))
    caption = "Each case. Relative: the norm of a token's difference over the norm of the reference's token."
    return section("Cases", table(caption, header, rows))


def _charts(report: AlignReport) -> list[str]:
    counts: Counter[tuple[float, float]] = Counter()
    for low, high, count in (one for case in report.cases for one in case.histogram):
        counts[low, high] += count
    bins = [(low, high, count) for (low, high), count in sorted(counts.items())]
    tokens = histogram("Tokens by 1 − cosine", bins, "1 − cosine", 1 - report.threshold)
    lead = "Tokens of all cases by 1 − cosine to the reference's. The first bar includes closer ones, the last one NaN."
    closeness = section("How close the tokens are", element("p", lead), tokens)
    layers = line_chart("Largest relative difference by layer", [(c.name, c.drift) for c in report.cases], "layer")
    lead = "Largest relative difference of a token before the first layer (0) and after each; the legend has the last."
    lead += "" if report.capacity is None else " Per-layer numbers are of the uncompiled layers."
    drift = section("Drift per layer", element("p", lead), layers)
    # In this order: max() passes over a NaN that does not stand first.
    distances = [(c.name, [max(1 - cosine, 0.0) for cosine in c.layer_cosines]) for c in report.cases]
    angles = line_chart("Largest 1 − cosine by layer", distances, "layer")
    lead = "The same for 1 − cosine: the higher a line, the lower the cosine of some token."
    return [closeness, drift, section("Cosine per layer", element("p", lead), angles)]

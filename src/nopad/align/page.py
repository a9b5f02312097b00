"""The page of an alignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nopad.align.report import DISTANCE_LIMIT, POOLED_LIMIT, RELATIVE_LIMIT, AlignReport
from nopad.counts import counted
from nopad.html import (
    element,
    gallery,
    jpeg,
    line_chart,
    near_one,
    page,
    pairs,
    scientific,
    section,
    table,
    write,
)

SIDE = 640
"""Longest side of an image on the page, in pixels."""


def align_page(report: AlignReport) -> str:
    """The page of an alignment: the verdict, where tokens differ most, the drift over the layers, and every case."""
    failed = sum(not case.passed for case in report.cases)
    verdict = f"Failed: {failed} of {counted(len(report.cases), 'case')}" if failed else "Failed: no case was compared"
    if report.passed and report.precision is None:
        verdict = "Passed: the packed features equal the reference's"
    elif report.passed:
        verdict = f"Passed: every cosine to the reference's features is more than {report.threshold:g}"
    parts = [element("p", f"nopad align · {report.checkpoint}")]
    parts += [element("h1", verdict, "good" if report.passed else "bad")]
    parts += [*_worst(report), _drift(report), _cases(report)] if report.cases else []
    parts.append(_setting(report))
    if report.skipped:
        parts.append(section("Skipped", "<ul>", *(element("li", reason) for reason in report.skipped), "</ul>"))
    return page(f"{verdict.split(':')[0]} · {report.checkpoint}", parts)


def write_align_page(report: AlignReport, path: str | Path) -> None:
    """Write the page of an alignment, all of it or nothing; directories are made."""
    write(align_page(report), path)


def _setting(report: AlignReport) -> str:
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


def _worst(report: AlignReport) -> list[str]:
    if report.worst is None:
        return []
    # Imported here because they import torch.
    from PIL import Image

    from nopad.maps import overlay

    worst, image = report.worst, Image.fromarray(report.worst.pixels)
    largest = float(worst.difference.max())
    row, column = divmod(int(worst.difference.argmax()), worst.difference.shape[1])
    shown = worst.difference.clamp(1e-12, 1e12).log10()
    heat = overlay(image, shown, opacity=0.8)
    images = [
        (jpeg(image, SIDE, 85), "as the models saw it", [f"{image.width} × {image.height} pixels"]),
        (jpeg(heat, SIDE, 85), "difference of each token", ["bright is more, log scale"]),
    ]
    lead = (
        f"{worst.case}: the token in row {row + 1}, column {column + 1} differs most, by {scientific(largest)} "
        f"of the norm of the reference's"
    )
    lead += f"; the limit is {RELATIVE_LIMIT:.0e}." if report.dtype == "float32" and report.precision is None else "."
    return [section("Where a token differs most", element("p", lead), gallery(images, whole=True))]


def _drift(report: AlignReport) -> str:
    steps = max(len(case.drift) for case in report.cases)
    layers = [[case.drift[step] for case in report.cases if step < len(case.drift)] for step in range(steps)]
    lines = [("largest of all cases", [_largest(values) for values in layers])]
    minima = [min(values, key=_nan_last) for values in layers] if len(report.cases) > 1 else []
    lines += [(case.name, list(case.drift)) for case in report.cases if not case.passed]
    if report.dtype == "float32" and report.precision is None:
        lines.append(("limit", [RELATIVE_LIMIT] * steps))
    chart = line_chart("Largest relative difference by layer", lines, "layer", minima=minima)
    lead = "Largest relative difference of a token before the first layer (0) and after each; the legend has the last."
    lead += " The band goes down to the case where it is smallest." if minima else ""
    lead += "" if report.capacity is None else " Per-layer numbers are of the uncompiled layers."
    return section("Drift per layer", element("p", lead), chart)


def _largest(values: Sequence[float]) -> float:
    """The largest number, NaN where there is one."""
    return next((value for value in values if math.isnan(value)), max(values))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value

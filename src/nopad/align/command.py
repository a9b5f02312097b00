"""`nopad align`."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from nopad.align.report import AlignReport
from nopad.command_options import (
    DTYPES,
    FAILURE,
    SUCCESS,
    add_checkpoint_options,
    add_device_options,
    add_report_options,
    check_report,
    print_report,
    resolve_device,
)
from nopad.counts import counted
from nopad.terminal import columns, configure_transformers, print_progress, printable

if TYPE_CHECKING:
    from nopad.align.batch_invariance import BatchInvarianceReport

LAYERS_SHOWN = 12
THRESHOLD = 0.99


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad align`."""
    add_checkpoint_options(parser)
    parser.add_argument("--images", metavar="DIR", help="folder of photos to compare on, too")
    add_report_options(parser)
    invariance = "check batch invariance instead: an image's features are bit-equal whatever it is packed with"
    parser.add_argument("--batch-invariance", action="store_true", help=invariance)
    parser.add_argument(
        "--capacity", type=int, metavar="N", help="with --batch-invariance: tokens of a pack (default: 4096)"
    )
    add_align_options(parser)


def add_align_options(parser: argparse.ArgumentParser) -> None:
    """The options that `nopad align` and the scripts of `model_factory/` have in common."""
    add_device_options(parser)
    dtype = "of both models (default: float32; with --precision fp8 on a GPU, bfloat16)"
    parser.add_argument("--dtype", choices=DTYPES, default=None, help=dtype)
    precision = "format of the packed model's layers; then the threshold alone decides"
    parser.add_argument("--precision", choices=("fp8", "int8"), default=None, help=precision)
    compiled = "compare the packed model's compiled layers, on a GPU the fused ones"
    parser.add_argument("--compile", action="store_true", help=compiled)
    parser.add_argument(
        "--threshold", type=float, default=None, help=f"a token's cosine has to be above it (default: {THRESHOLD})"
    )


def run(options: argparse.Namespace) -> int:
    """Align or check batch invariance, print or write the report, and return the exit status.

    Raises:
        ValueError, OSError, ImportError: wrong use; the command line prints the message.
    """
    if options.batch_invariance:
        return run_batch_invariance(options)
    if options.capacity is not None:
        raise ValueError("--capacity: goes with --batch-invariance")
    return report_alignment(
        options,
        checkpoint=options.checkpoint,
        images=options.images,
        revision=options.revision,
        prefix=options.prefix,
        trust_remote_code=options.trust_remote_code,
    )


def report_alignment(options: argparse.Namespace, **arguments: Any) -> int:
    """Align with the common options, print or write the report, and return the exit status."""
    check_report(options.report)
    print_progress("importing torch and transformers")
    from nopad.align.page import write_align_page
    from nopad.align.run import align

    configure_transformers()
    report = align(
        **_common(options),
        compile=options.compile,
        threshold=THRESHOLD if options.threshold is None else options.threshold,
        progress=print_progress,
        **arguments,
    )
    print_report(report, options, table=align_table, write_page=write_align_page)
    return SUCCESS if report.passed else FAILURE


def run_batch_invariance(options: argparse.Namespace) -> int:
    """`nopad align --batch-invariance`."""
    if options.images or options.report:
        raise ValueError("--images, --report: not with --batch-invariance, which takes random patches and has no page")
    if options.threshold is not None or options.trust_remote_code:
        raise ValueError("--threshold, --trust-remote-code: not with --batch-invariance, which runs no reference")
    if options.compile:
        raise ValueError("--compile: not with --batch-invariance, which runs compiled and eager layers")
    print_progress("importing torch and transformers")
    from nopad.align.batch_invariance import CAPACITY, check_batch_invariance
    from nopad.loading import load

    configure_transformers()
    encoder = load(options.checkpoint, revision=options.revision, prefix=options.prefix, **_common(options))
    report = check_batch_invariance(
        encoder,
        capacity=CAPACITY if options.capacity is None else options.capacity,
        progress=print_progress,
    )
    print_report(report, options, table=batch_invariance_table)
    return SUCCESS if report.passed else FAILURE


def _common(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `nopad.load` and `nopad.align` from the options.

    Raises:
        ValueError: a device that torch does not see.
    """
    import torch

    device = resolve_device(options.device)
    default = "bfloat16" if options.precision is not None and device.startswith("cuda") else "float32"
    return {
        "device": device,
        "dtype": getattr(torch, options.dtype or default),
        "attention": options.attention,
        "precision": options.precision,
    }


def align_table(report: AlignReport) -> str:
    """An alignment report for a terminal."""
    pools = any(case.max_pooled_relative is not None for case in report.cases)
    header = ("case", "tokens", "min cosine", "mean cosine", "max abs", "max relative")
    rows: list[tuple[str, ...]] = [(*header, *["pooled relative"] * pools, "")]
    for case in report.cases:
        numbers = [
            f"{case.min_cosine:.7f}",
            f"{case.mean_cosine:.7f}",
            f"{case.max_abs:.1e}",
            f"{case.max_relative:.1e}",
        ]
        if pools:
            numbers.append("–" if case.max_pooled_relative is None else f"{case.max_pooled_relative:.1e}")
        rows.append((case.name, str(case.tokens), *numbers, "ok" if case.passed else "FAILED"))
    lines = [
        f"{report.checkpoint}: packed {report.family} compared with {report.reference}",
        f"{_arithmetic(report)} on {report.device}, attention {report.attention}; weights {report.weights}",
    ]
    if report.capacity is not None:
        lines.append(f"packed layers {report.execution}, in packs of {report.capacity:,} tokens")
        lines[-1] += "" if report.precision is None else "; per-layer cosines are of the uncompiled layers"
    lines += ["", *columns(rows)]
    if report.precision is not None and report.cases:
        lines += ["", *columns(_layer_rows(report))]
    lines += [
        *(f"  {case.name}: {failure}" for case in report.cases for failure in case.failures),
        *(f"skipped: {reason}" for reason in report.skipped),
        "",
    ]
    good = sum(case.passed for case in report.cases)
    verdict = f"{'PASSED' if report.passed else 'FAILED'}: {good} of {counted(len(report.cases), 'case')}"
    if report.precision is None:
        return "\n".join(map(printable, [*lines, f"{verdict} equal the reference"]))
    rule = f"in {report.precision} the threshold alone decides"
    lines.append(f"{verdict} have every cosine to the reference above {report.threshold:g}; {rule}")
    return "\n".join(map(printable, lines))


def _layer_rows(report: AlignReport) -> list[tuple[str, ...]]:
    """Cosines layer by layer, of some layers where there are many; layer 0 is the input of the first."""
    last = len(report.cases[0].layer_cosines) - 1
    layers = [*range(0, last, max(1, math.ceil(last / LAYERS_SHOWN))), last]
    rows = [("min cosine after layer", *map(str, layers))]
    for case in report.cases:
        rows.append((case.name, *(f"{case.layer_cosines[layer]:.4f}" for layer in layers)))
    return rows


def batch_invariance_table(report: BatchInvarianceReport) -> str:
    """The report on batch invariance for a terminal."""
    rows: list[tuple[str, ...]] = [
        ("layers", "patches of the image", "packs", "same bits", "beside NaN", "beside infinity", "")
    ]
    for case in report.cases:
        counts = (case.packs, case.same, case.same_beside_nan, case.same_beside_infinity)
        grid = " × ".join(map(str, case.grid))
        rows.append((case.name, grid, *map(str, counts), "ok" if case.passed else "FAILED"))
    good = sum(case.passed for case in report.cases)
    verdict, have = "PASSED" if report.passed else "FAILED", "has" if good == 1 else "have"
    lines = [
        f"{report.checkpoint}: packs of {report.capacity:,} tokens",
        f"{_arithmetic(report)} on {report.device}, attention {report.attention}",
        "",
        *columns(rows),
        "",
        f"{verdict}: {good} of {counted(len(report.cases), 'image')} {have} the same features in every pack",
    ]
    return "\n".join(map(printable, lines))


def _arithmetic(report: AlignReport | BatchInvarianceReport) -> str:
    return report.dtype if report.precision is None else f"{report.dtype}, layers in {report.precision},"

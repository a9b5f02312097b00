"""`nopad bench`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from nopad.bench.defaults import ON_CPU, ON_GPU
from nopad.bench.report import MIN_COSINE, BenchReport, Row
from nopad.bench.suite_report import SuiteReport, SuiteWorkload, format_of
from nopad.command_options import (
    DTYPES,
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

SUITE_HEADER = ("", "runs", "ms", "min … max", "images/s", "of peak", "×", "× float32", "cosine", "")
HEADER = ("", "capacity", "ms", "min … max", "images/s", "tokens/s", "TFLOP/s", "of peak", "GiB", "cosine", "")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad bench`."""

    def default(name: str) -> str:
        gpu, cpu = ON_GPU.describe(name), ON_CPU.describe(name)
        return f"(default: {gpu} on a GPU, {cpu} on a CPU)"

    without = "without one, on a CPU, a large and a small model with random weights, in a few minutes"
    add_checkpoint_options(parser, without=without)
    add_device_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, help=f"of all candidates {default('dtype')}")
    workloads = (
        "many sizes of at most 1,024 patches, one size of 224 pixels or the model's own, all of these, or small images "
        "of 16 to 100 patches (default: mixed)"
    )
    parser.add_argument("--workload", choices=("mixed", "224", "all", "small"), default=None, help=workloads)
    parser.add_argument("--images", type=int, metavar="N", help=f"images of each workload {default('images')}")
    capacities = f"tokens per pack; each is measured {default('capacities')}"
    parser.add_argument("--capacity", type=_integers, metavar="N,N,…", help=capacities)
    either = argparse.BooleanOptionalAction
    parser.add_argument("--baselines", action=either, default=True, help="run the reference model, too")
    compiled = "run compiled candidates, too (default: yes on a GPU, on a CPU those that need no compiler)"
    parser.add_argument("--compile", action=either, default=None, help=compiled)
    fp8 = "run the packed model in float8, too; implies --compile"
    parser.add_argument("--fp8", action="store_true", help=fp8)
    int8 = "run the packed model in int8, too, which is for a CPU"
    parser.add_argument("--int8", action="store_true", help=int8)
    parser.add_argument("--runs", type=int, metavar="N", help=f"timed runs of each candidate {default('runs')}")
    parser.add_argument("--seed", type=int, default=0, help="seed of sizes and pixels (default: 0)")
    add_report_options(parser)


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, print or write its report, and return the exit status.

    Raises:
        ValueError, OSError, ImportError: wrong use; the command line prints the message.
    """
    if options.checkpoint is None:
        return run_suite(options)
    for option, name in (("fp8", "float8"), ("int8", "int8")):
        if getattr(options, option) and options.compile is False:
            raise ValueError(
                f"--{option}: runs the packed model in {name} compiled, got --no-compile too; give one of them"
            )
    check_report(options.report)
    print_progress("importing torch and transformers")
    import torch

    from nopad.bench.page import write_bench_page
    from nopad.bench.run import bench

    configure_transformers()
    report = bench(
        options.checkpoint,
        device=resolve_device(options.device),
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
        attention=options.attention,
        workload=options.workload or "mixed",
        images=options.images,
        capacities=options.capacity,
        baselines=options.baselines,
        compile=options.compile,
        float8=options.fp8,
        int8=options.int8,
        runs=options.runs,
        seed=options.seed,
        revision=options.revision,
        prefix=options.prefix,
        trust_remote_code=options.trust_remote_code,
        progress=print_progress,
    )
    print_report(report, options, table=bench_table, write_page=write_bench_page)
    return SUCCESS


def run_suite(options: argparse.Namespace) -> int:
    """`nopad bench` without a checkpoint."""
    fixed = "dtype", "workload", "images", "capacity", "compile", "revision", "report"
    needs_checkpoint = [f"--{name}" for name in fixed if getattr(options, name) is not None]
    needs_checkpoint += [
        f"--{name.replace('_', '-')}" for name in ("fp8", "int8", "trust_remote_code") if getattr(options, name)
    ]
    needs_checkpoint += [] if options.baselines else ["--no-baselines"]
    needs_checkpoint += [] if options.attention == "auto" else ["--attention"]
    if needs_checkpoint:
        raise ValueError(
            f"{', '.join(needs_checkpoint)}: expected a checkpoint; without one, nopad bench chooses models and sizes"
        )
    print_progress("importing torch and transformers")
    device = resolve_device(options.device)
    if device != "cpu":
        raise ValueError(f"checkpoint: expected one on {device}; without one, nopad bench measures a CPU: --device cpu")
    from nopad.bench.suite import bench_suite

    configure_transformers()
    report = bench_suite(runs=options.runs, seed=options.seed, progress=print_progress)
    print_report(report, options, table=suite_table)
    return SUCCESS


def suite_table(report: SuiteReport) -> str:
    """The suite for a terminal."""
    lines = [f"{report.device}; medians of interleaved runs; random weights, random pixels"]
    for workload in report.workloads:
        rows = [_suite_cells(workload, row) for row in workload.rows]
        lines += [
            "",
            f"{workload.checkpoint}, {workload.name}: {workload.description}",
            *columns([SUITE_HEADER, *rows]),
        ]
        lines += [f"skipped: {row.label}: {row.skipped}" for row in workload.rows if row.skipped is not None]
    load = report.load_time
    lines += ["", f"loading {load.checkpoint} from a local folder"]
    if load.skipped is not None or load.times is None or load.memory is None:
        lines.append(f"skipped: {load.skipped}")
    else:
        load_ms, read_ms = (statistics.median(each) * 1e3 for each in (load.load_seconds, load.read_seconds))
        figures = f"{load_ms:,.0f} ms, {load.times:.2f} × the {read_ms:,.0f} ms that reading its bytes takes"
        lines.append(f"{figures}; peak memory {load.memory:.2f} × the weights ({load.bytes / 2**30:.2f} GiB)")
    lines += [
        "",
        "of peak: share of the speed of plain GEMMs right before and after, in the same format, for int8 in float32;",
        "×: times as fast as transformers' model, one image at a time: in the same format, and in float32;",
        "cosine: lowest of a token with the packed encoder in float32 on that image alone,",
        f"WRONG unless above {MIN_COSINE}",
    ]
    return "\n".join(map(printable, lines))


def _suite_cells(workload: SuiteWorkload, row: Row) -> tuple[str, ...]:
    if row.median is None or row.min_cosine is None:
        return (row.label, *["–"] * (len(SUITE_HEADER) - 2), "skipped")
    times = workload.times(row, format_of(row)), workload.times(row, "float32")
    return (
        row.label,
        f"{len(row.seconds)}",
        f"{row.median * 1e3:,.1f}",
        f"{min(row.seconds) * 1e3:,.1f} … {max(row.seconds) * 1e3:,.1f}",
        f"{row.images_per_second:,.4g}",
        *("–" if each is None else f"{each:.2f}" for each in (row.share(workload.peak_flops), *times)),
        f"{row.min_cosine:.6f}",
        "ok" if row.agrees else "WRONG",
    )


def bench_table(report: BenchReport) -> str:
    """A benchmark for a terminal."""
    beside = f" beside {report.reference}"
    if report.reference is None:
        beside = f", without a reference: {report.no_reference}"
    medians = f"medians of {counted(report.runs, 'run')}, interleaved"
    lines = [
        f"{report.checkpoint}: packed {report.family}{beside}",
        f"{report.dtype} on {report.device}, attention {report.attention}; {medians}",
    ]
    for stats in report.workloads:
        rows = [row for row in report.rows if row.workload == stats.name]
        lines += [
            "",
            f"{stats.name}: {stats.describe()}",
            f"measured peak: {stats.measured_peak.describe()}",
            *columns([HEADER, *(_cells(report, row) for row in rows)]),
            *(f"skipped: {row.label}: {row.skipped}" for row in rows if row.skipped is not None),
            *_executions(rows),
        ]
    lines += [
        "",
        "of peak: share of the peak measured right before and after each run; GiB: weights and peak memory on top;",
        f"cosine: lowest of a token with the packed encoder on that image alone, WRONG unless above {MIN_COSINE}",
    ]
    return "\n".join(map(printable, lines))


def _executions(rows: Sequence[Row]) -> list[str]:
    """The `execution` of compiled layers, and the packs that it is of."""
    capacities: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.execution is not None:
            capacities.setdefault((row.name, row.execution), []).append(f"{row.capacity:,}")
    return [f"layers of {name}: {how} (packs of {' and '.join(sizes)})" for (name, how), sizes in capacities.items()]


def _cells(report: BenchReport, row: Row) -> tuple[str, ...]:
    capacity = "–" if row.capacity is None else f"{row.capacity:,}"
    share = report.share(row)
    if row.median is None or row.min_cosine is None or share is None:
        return (row.name, capacity, *["–"] * (len(HEADER) - 3), "skipped")
    return (
        row.name,
        capacity,
        f"{row.median * 1e3:,.1f}",
        f"{min(row.seconds) * 1e3:,.1f} … {max(row.seconds) * 1e3:,.1f}",
        f"{row.images_per_second:,.4g}",
        f"{row.tokens_per_second:,.0f}",
        f"{row.teraflops:.4g}",
        f"{share:.2f}",
        "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f}",
        f"{row.min_cosine:.6f}",
        "ok" if row.agrees else "WRONG",
    )


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"expected integers separated by commas, such as 4096,16384, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None

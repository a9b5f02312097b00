"""The command line: `nopad align`, `nopad embed`, `nopad bench`, `nopad models`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from nopad.bench import command as bench_command
from nopad.embedding import command as embedding_command
from nopad.terminal import columns

DTYPES = ("float32", "bfloat16", "float16")
PASSED, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 done or passed, 1 failed the check, 2 wrong use or an error, 130 stopped."""
    options = build_parser().parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"nopad {options.command}: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print(f"nopad {options.command}: stopped", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="nopad", description="Pretrained vision encoders without padding.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    align = commands.add_parser("align", help="prove that packed features equal the original model's")
    align.add_argument("checkpoint", help="Hub name, folder, weights file, or untrained:<published name>")
    align.add_argument("--images", metavar="DIR", help="a folder of photos to compare on, too")
    align.add_argument("--json", action="store_true", help="print the report as JSON")
    align.add_argument("--report", metavar="FILE.html", help="write the report as one HTML page")
    align.add_argument("--revision", help="branch, tag or commit on the Hub")
    trust = "run the checkpoint's own code as the original, where transformers does not have it"
    align.add_argument("--trust-remote-code", action="store_true", help=trust)
    company = "instead prove that an image's features do not depend, to the bit, on what it is packed with"
    align.add_argument("--company", action="store_true", help=company)
    align.add_argument("--capacity", type=int, metavar="N", help="with --company: tokens of a pack (default: 4096)")
    add_align_options(align)
    align.set_defaults(run=run_align)

    embed = commands.add_parser("embed", help="turn folders of pictures into a table of features")
    embedding_command.add_arguments(embed)
    embed.set_defaults(run=embedding_command.run)

    bench = commands.add_parser("bench", help="measure throughput beside the original model's")
    bench_command.add_arguments(bench)
    bench.set_defaults(run=bench_command.run)

    models = commands.add_parser("models", help="list the published models")
    models.add_argument("--json", action="store_true", help="print the list as JSON")
    models.set_defaults(run=run_models)
    return parser


def add_align_options(parser: argparse.ArgumentParser) -> None:
    """The options that `nopad align` and the scripts of `model_factory/` have in common."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; cuda where there is one, unless given")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="both sides run in it (default: float32)")
    parser.add_argument("--attention", default="auto", help="kernel of the packed model (default: the best there is)")
    parser.add_argument("--threshold", type=float, default=0.99, help="least cosine of a token (default: 0.99)")


def run_align(options: argparse.Namespace) -> int:
    """`nopad align`."""
    if options.company:
        return run_company(options)
    if options.capacity is not None:
        raise ValueError("--capacity: goes with --company")
    return report_alignment(
        options,
        checkpoint=options.checkpoint,
        images=options.images,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )


def report_alignment(options: argparse.Namespace, **arguments: Any) -> int:
    """Align with the common options, print or write what was asked for, and return the exit status."""
    import torch
    from transformers.utils import logging as transformers_logging

    from nopad.align import align
    from nopad.report import write_align_page

    transformers_logging.disable_progress_bar()
    report = align(
        device=device_of(options),
        dtype=getattr(torch, options.dtype),
        attention=options.attention,
        threshold=options.threshold,
        progress=lambda line: print(f"· {line}", file=sys.stderr),
        **arguments,
    )
    if options.report:
        write_align_page(report, options.report)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(align_table(report))
        if options.report:
            print(f"report: {options.report}")
    return PASSED if report.passed else FAILED


def run_company(options: argparse.Namespace) -> int:
    """`nopad align --company`."""
    import torch
    from transformers.utils import logging as transformers_logging

    from nopad.company import CAPACITY, prove
    from nopad.loading import load

    if options.images or options.report:
        raise ValueError("--images, --report: not with --company, which takes random patches and has no page")
    transformers_logging.disable_progress_bar()
    encoder = load(
        options.checkpoint,
        revision=options.revision,
        device=device_of(options),
        dtype=getattr(torch, options.dtype),
        attention=options.attention,
    )
    report = prove(
        encoder,
        capacity=CAPACITY if options.capacity is None else options.capacity,
        progress=lambda line: print(f"· {line}", file=sys.stderr),
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
        return PASSED if report.passed else FAILED
    rows = [("layers", "patches of the image", "packs", "same bits", "beside NaN", "beside infinity", "")]
    for case in report.cases:
        counts = (case.packs, case.same, case.same_beside_nan, case.same_beside_infinity)
        grid = " × ".join(map(str, case.grid))
        rows.append((case.name, grid, *map(str, counts), "ok" if case.passed else "FAILED"))
    print(f"{report.checkpoint}: packs of {report.capacity:,} tokens")
    print(f"{report.dtype} on {report.device}, attention {report.attention}\n")
    print("\n".join(columns(rows)))
    good = sum(case.passed for case in report.cases)
    verdict = "PASSED" if report.passed else "FAILED"
    print(f"\n{verdict}: {good} of {len(report.cases)} images have the same features in any company")
    return PASSED if report.passed else FAILED


def device_of(options: argparse.Namespace) -> str:
    """The device asked for, else CUDA where there is one.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: got {device!r}, but torch sees no CUDA device; use --device cpu")
    return device


def align_table(report: Any) -> str:
    """An alignment report for a terminal."""
    rows = [("case", "tokens", "min cosine", "mean cosine", "max abs", "max relative", "")]
    for case in report.cases:
        numbers = (
            f"{case.min_cosine:.7f}",
            f"{case.mean_cosine:.7f}",
            f"{case.max_abs:.1e}",
            f"{case.max_relative:.1e}",
        )
        rows.append((case.name, str(case.tokens), *numbers, "ok" if case.passed else "FAILED"))
    lines = [
        f"{report.checkpoint}: packed {report.family} against {report.original}",
        f"{report.dtype} on {report.device}, attention {report.attention}; weights {report.weights}",
        "",
        *columns(rows),
        *(f"  {case.name}: {failure}" for case in report.cases for failure in case.failures),
        *(f"not run: {reason}" for reason in report.skipped),
        "",
    ]
    good = sum(case.passed for case in report.cases)
    verdict = "PASSED" if report.passed else "FAILED"
    return "\n".join([*lines, f"{verdict}: {good} of {len(report.cases)} cases equal the original"])


def run_models(options: argparse.Namespace) -> int:
    """`nopad models`."""
    import torch

    from nopad.families import FAMILIES

    models = []
    for family in FAMILIES:
        for name in family.published:
            with torch.device("meta"):
                model = family(family.published_config(name))
            config = model.config
            models.append(
                {
                    "name": name,
                    "family": family.family,
                    "hidden_size": config.hidden_size,
                    "layers": config.num_hidden_layers,
                    "heads": config.num_attention_heads,
                    "patch_size": config.patch_size,
                    "parameters": model.num_parameters(),
                    "input": model.default_preprocessing.describe().split(";")[0],
                }
            )
    if options.json:
        print(json.dumps(models, indent=2))
    else:
        rows = [
            tuple(models[0]),
            *(tuple(f"{v:,}" if k == "parameters" else str(v) for k, v in m.items()) for m in models),
        ]
        print("\n".join(columns(rows)))
    return PASSED

"""Exit statuses, options that several commands have, their checks, and the output of a report."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from nopad.counts import counted
from nopad.environment import check_device
from nopad.terminal import json_text, print_summary, printable

SUCCESS, FAILURE, WRONG_USE, UNFINISHED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit statuses: done or passed; not passed, or nothing embedded; wrong use or an error; unfinished, since something
could not be reached, and worth another try (EX_TEMPFAIL of sysexits.h); stopped by a signal."""

DTYPES = ("float32", "bfloat16", "float16")
"""Choices of `--dtype`."""


def add_checkpoint_options(parser: argparse.ArgumentParser, *, without: str | None = None) -> None:
    """Add the checkpoint and how it is loaded; `without` says what the command does where none is given."""
    checkpoint = "Hub name, folder, weights file, or untrained:<published name>"
    if without is None:
        parser.add_argument("checkpoint", help=checkpoint)
    else:
        parser.add_argument("checkpoint", nargs="?", help=f"{checkpoint}; {without}")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_prefix_option(parser)
    trust = "run the checkpoint's own code as the reference, where transformers does not have it"
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)


def add_prefix_option(parser: argparse._ActionsContainer) -> None:
    """Add `--prefix`."""
    prefix = "of the vision tower's tensors in the checkpoint of a larger model (default: searched)"
    parser.add_argument("--prefix", help=prefix)


def check_prefix(options: argparse.Namespace) -> None:
    """Raise `ValueError` on a `--prefix` without the `--model` that it is of."""
    if options.prefix is not None and options.model is None:
        raise ValueError(f"--prefix: expected a --model whose tensors have it, got {options.prefix!r} alone")


def add_device_options(parser: argparse._ActionsContainer) -> None:
    """Add `--device`, for `resolve_device`, and `--attention`."""
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, … (default: cuda if available, else cpu)")
    parser.add_argument("--attention", default="auto", help="kernel of the packed model (default: the fastest)")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--report`, for `check_report` and `print_report`."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON; null for NaN and infinity")
    parser.add_argument("--report", metavar="FILE.html", help="write the report as one HTML page")


def resolve_device(requested: str | None) -> str:
    """The device of `--device`; `None` is `cuda` if available, else `cpu`.

    Raises:
        ValueError: not a device, one without values, or one that torch does not see.
    """
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested is None:
        return "cuda" if num_gpus else "cpu"
    device = check_device("--device", requested)
    if device.type == "cuda" and not num_gpus:
        raise ValueError(f"--device: got {requested!r}, but torch sees no CUDA device; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        names = f"cuda:0 to cuda:{num_gpus - 1}" if num_gpus > 1 else "cuda:0"
        raise ValueError(f"--device: got {requested!r}, but torch sees {counted(num_gpus, 'CUDA device')}: {names}")
    return requested


def check_report(requested: str | None) -> None:
    """Check before a long run that the file of `--report` can be written; nothing is left there.

    Raises:
        ValueError: a folder, or a path where this user cannot write.
    """
    if requested is None:
        return
    path = os.path.realpath(requested)
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not os.path.exists(path) or os.path.isfile(path):  # else a pipe or the like, which may not be tried
            folder = os.path.dirname(path)
            while not os.path.exists(folder):
                folder = os.path.dirname(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise ValueError(
            f"--report: expected a file that can be written, got {requested!r}: {error.strerror}"
        ) from None


def print_report(
    report: Any,
    options: argparse.Namespace,
    *,
    table: Callable[[Any], str],
    write_page: Callable[[Any, str], None] | None = None,
) -> None:
    """Print a report, as JSON by `options.json`, and write the page of `options.report`.

    Args:
        report: with `to_dict`.
        options: the options that `add_report_options` has added.
        table: makes the report a text.
        write_page: writes the report to a path; `None` where the report has no page.
    """
    print_summary(json_text(report.to_dict()) if options.json else table(report))
    if options.report is not None and write_page is not None:
        write_page(report, options.report)
        print(printable(f"report: {options.report}"), file=sys.stderr if options.json else sys.stdout)

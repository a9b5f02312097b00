"""`nopad embed`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING

from nopad.command_options import FAILURE, INTERRUPTED, SUCCESS, UNFINISHED, WRONG_USE, resolve_device
from nopad.counts import counted
from nopad.embedding.actors.engine import LostEngineError
from nopad.embedding.inputs.names import check_source
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.embedding.progress import Display, clock, display
from nopad.embedding.settings import Settings
from nopad.embedding.signals import stop_on_signals
from nopad.environment import start_cuda
from nopad.extras import install
from nopad.local_paths import check_local
from nopad.pipeline import process_server
from nopad.preprocessing.limits import MAX_PATCHES
from nopad.storage.addresses import is_address, local_path
from nopad.storage.errors import UnreachableStoreError, UnusableStoreError
from nopad.storage.stores import check_writable
from nopad.terminal import import_transformers, json_text, print_error, print_summary, printable, shell_command

if TYPE_CHECKING:
    from nopad.embedding.summary import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad embed`."""
    add_job_options(parser)
    out = "folder of the table, or its address in a store (s3://bucket/table); go on with the same command"
    parser.add_argument("--out", required=True, metavar="DIR", help=out)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON; null for NaN and infinity")


def add_job_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """The sources of a job, and the options of `Settings`, without those that are named."""
    sources = "folders, globs, list files (.txt), WebDataset tars, Parquet files, datasets saved to disk, videos"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    for option in fields(Settings):
        if option.name in without:
            continue
        required = option.default is MISSING
        default = None if required else option.default
        help = option.metadata["help"] + (f" (default: {default})" if default else "")
        name = "--" + option.name.replace("_", "-")
        parser.add_argument(name, required=required, default=default, help=help, **option.metadata["argument"])


def run(options: argparse.Namespace) -> int:
    """Embed, print the summary, and return the exit status.

    0: every input has its row; 1: not one could be embedded; 75: shards could not be made now, or 130: stopped, and the
    same command goes on.

    Raises:
        ValueError, OSError, ImportError: wrong use, or a folder that cannot be written.
    """
    check_packages()
    options.out = local_path(options.out)
    if is_address(options.out):
        check_writable("--out", options.out)
    else:
        check_local("--out", options.out)
    for source in options.sources:
        check_source("SOURCE", source)
    go_on = f"to go on: {_command(options)}"
    try:
        with stop_on_signals(go_on) as stop, display(sys.stderr) as shown, _Messages(shown):
            shown.message(_beginning(options))  # at once: what is imported below takes seconds
            shown.message("importing torch and transformers")
            in_process = options.actors is None and options.part is None
            if in_process:
                process_server.start()  # it imports torch while this process does
                start_cuda(options.device)  # while transformers is imported
            from nopad.embedding.api import embed_by

            if in_process:  # actors may have GPUs that this machine has not
                resolve_device(options.device)
            with redirect_stdout(sys.stderr):  # Ray prints to it when an actor dies; it is for the summary alone
                summary = embed_by({**vars(options), "stop": stop, "progress": shown.report}, import_transformers)
    except UnusableStoreError as error:
        print_error(f"{error}; finished shards are kept; {go_on}")
        return WRONG_USE
    except (UnreachableSourceError, LostEngineError) as error:
        print_error(f"{error}; {go_on}")
        return UNFINISHED
    except UnreachableStoreError as error:
        print_error(f"{error.strerror}; finished shards are kept; {go_on}")
        return UNFINISHED
    except InterruptedError as error:
        print_error(f"{error}; {go_on}")
        return INTERRUPTED
    except KeyboardInterrupt:
        print_error(f"stopped, the shard in hand is lost, finished ones are kept; {go_on}")
        return INTERRUPTED
    if options.json:
        print_summary(json_text(summary.to_dict()))
    else:
        print_summary(describe(summary))
    if summary.unmade and not stop.is_set():
        print_error(f"{_unmade(summary)}; {go_on}")
        return UNFINISHED
    if summary.to_go:
        print_error(f"stopped with {counted(summary.to_go, 'input')} to go; {go_on}")
        return INTERRUPTED
    return FAILURE if summary.rows and summary.failed == summary.rows else SUCCESS


def check_packages() -> None:
    """Raise ImportError where a package of the extra `embed` is missing."""
    for package in ("filelock", "pyarrow", "rich"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: {install('embed')}")


def _unmade(summary: Summary) -> str:
    name, reason = next(iter(summary.unmade.items()))
    return printable(
        f"unfinished, {counted(summary.to_go, 'input')} to go: {counted(len(summary.unmade), 'shard')} could not be "
        f"made now; the first, {name}: {reason} (--unreachable-rows makes failed rows of such inputs)"
    )


def _beginning(options: argparse.Namespace) -> str:
    """The first line of output."""
    sources = options.sources[0] if len(options.sources) == 1 else f"{len(options.sources):,} sources"
    cap = ""
    if options.max_patches == "auto":
        cap = (
            f"; images of more than {MAX_PATCHES:,} patches are scaled down where the model has no limit of its own "
            f"(--max-patches N, or none)"
        )
    dtype = " in bfloat16 on a GPU that has it, else float32 (--dtype)" if options.dtype == "auto" else ""
    return f"embedding {sources} into {options.out} by {options.model}{dtype}{cap}"


class _Messages(logging.Handler):
    """Shows what `nopad.embed` logs about the steps before the first input is read."""

    def __init__(self, shown: Display) -> None:
        super().__init__()
        self.shown = shown
        self.logger = logging.getLogger("nopad.embedding.table_run")

    def emit(self, record: logging.LogRecord) -> None:
        self.shown.message(record.getMessage())

    def __enter__(self) -> None:
        self.before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before[0])
        self.logger.propagate = self.before[1]


def _command(options: argparse.Namespace) -> str:
    """The command line that runs this again."""
    program = sys.argv[0]
    if os.path.basename(program) == "__main__.py":
        return shell_command([sys.executable, "-m", "nopad", *options.arguments])
    return shell_command([program, *options.arguments])


def describe(summary: Summary) -> str:
    """A summary for a terminal."""
    from nopad.embedding.inputs.names import HIDDEN

    stats = summary.stats
    part = f"part {summary.part} of " if summary.part and summary.missing else ""
    lines = [f"{part}{summary.folder}: {summary.rows - summary.failed:,} embedded, {summary.failed:,} failed"]
    if summary.done and summary.seconds:
        lines.append(
            f"this run: {summary.done:,} in {clock(summary.seconds)}, {stats.images / summary.seconds:,.1f} images/s, "
            f"{stats.patches / summary.seconds:,.0f} tokens/s, fill {stats.fill:.1%}"
        )
        lines.append(str(summary.limit))
    elif not summary.to_go:
        lines.append("this run: nothing to do, every input has its row")
    if summary.part and summary.missing > summary.to_go:
        lines.append(f"{summary.missing - summary.to_go:,} inputs of other parts have no rows yet")
    elif summary.part and not summary.missing:
        lines.append("all parts are done")
    if summary.left_out:
        counts = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in summary.left_out.items())
        hint = ", --hidden takes what is hidden" if HIDDEN in summary.left_out else ""
        lines.append(f"left out as no images or videos: {counts}; name them in a list file to take them{hint}")
    if summary.failed:
        shards = summary.shards_with_failures
        lines.append(
            f"failures are rows with status 'failed' and the reason in 'error': "
            f"nopad.read_features({summary.folder!r}).failures, in {counted(len(shards), 'shard')} "
            f"({shards[0]}{', …' if len(shards) > 1 else ''}); --retry-failed tries them again, but for "
            f"what could not be listed, which takes another folder"
        )
    return "\n".join(map(printable, lines))

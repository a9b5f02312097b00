"""The command line: one function for each command of `nopad`."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from nopad import __version__
from nopad.align import command as align_command
from nopad.bench import command as bench_command
from nopad.command_options import INTERRUPTED, SUCCESS, UNFINISHED, WRONG_USE
from nopad.embedding import command as embedding_command
from nopad.embedding import plan_command
from nopad.embedding.inputs.reaching import UnreachableSourceError
from nopad.environment import process_start
from nopad.published import published_models
from nopad.search import command as search_command
from nopad.search import export_command
from nopad.storage.errors import UnreachableStoreError, UnusableStoreError
from nopad.suggestions import did_you_mean
from nopad.terminal import (
    ArgumentParser,
    MessageFormatter,
    OnceFilter,
    columns,
    json_text,
    open_standard_files,
    print_error,
    print_summary,
)
from nopad.view import command as view_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, one of those of `nopad.command_options`."""
    start = process_start() if arguments is None else time.perf_counter()
    open_standard_files()
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:  # argparse itself prints the usage of `nopad`, without the command's options
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.start = start
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(MessageFormatter("%(name)s: %(message)s"))
    handler.addFilter(OnceFilter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        _check_current_folder()
        return options.run(options)
    except UnusableStoreError as error:
        print_error(f"nopad {options.command}: {error}")
        return WRONG_USE
    except (UnreachableStoreError, UnreachableSourceError) as error:
        reason = error.strerror or error
        print_error(f"nopad {options.command}: {reason}; give the command again once it can be reached")
        return UNFINISHED
    except (ValueError, OSError, ImportError) as error:
        print_error(f"nopad {options.command}: {error}")
        return WRONG_USE
    except KeyboardInterrupt:
        print_error(f"nopad {options.command}: stopped")
        return INTERRUPTED
    finally:
        # CPython takes an interrupt within an exec of text, as dataclasses have, for unhandled until the next exec, and
        # ends by SIGINT, whatever the exit status.
        exec("")
        if arguments is None:
            gc.freeze()  # else Python looks through all of torch once more when it ends, for a second


def _check_current_folder() -> None:
    """Raise `FileNotFoundError` where the current folder was removed: MKL ends the process there when torch is used."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise FileNotFoundError("the current folder does not exist any more; change to another one") from error


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = ArgumentParser(prog="nopad", description="Pretrained vision encoders without padding.")
    parser.add_argument("--version", action="version", version=f"nopad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    align = commands.add_parser("align", help="compare packed features with the original model's")
    align_command.add_arguments(align)
    align.set_defaults(run=align_command.run)

    embed = commands.add_parser("embed", help="embed folders of images into a table of features")
    embedding_command.add_arguments(embed)
    embed.set_defaults(run=embedding_command.run)

    plan = commands.add_parser("plan", help="embed a sample, and print what the whole job will take")
    plan_command.add_arguments(plan)
    plan.set_defaults(run=plan_command.run)

    search_command.add_commands(commands)

    export = commands.add_parser("export", help="write a finished table as one Parquet file, for Lance or for Iceberg")
    export_command.add_arguments(export)
    export.set_defaults(run=export_command.run)

    view = commands.add_parser("view", help="show a table as a map to explore, or what models see in images")
    view_command.add_arguments(view)
    view.set_defaults(run=view_command.run)

    bench = commands.add_parser("bench", help="measure throughput beside the original model's")
    bench_command.add_arguments(bench)
    bench.set_defaults(run=bench_command.run)

    models = commands.add_parser("models", help="list the published models")
    models.add_argument("text", nargs="?", default="", metavar="TEXT", help="list only names that contain it")
    models.add_argument("--family", metavar="NAME", help="list only this family")
    models.add_argument("--json", action="store_true", help="print the list as JSON")
    models.set_defaults(run=run_models)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def run_models(options: argparse.Namespace) -> int:
    """`nopad models`."""
    models = published_models()
    families = list(dict.fromkeys(model["family"] for model in models))
    if options.family not in (None, *families):
        raise ValueError(f"--family: expected one of {', '.join(families)}, got {options.family!r}")
    models = [
        model
        for model in models
        if options.family in (None, model["family"]) and options.text.lower() in model["name"].lower()
    ]
    if not models:
        meant = did_you_mean(options.text, [model["name"] for model in published_models()])
        raise ValueError(f"TEXT: no published name contains {options.text!r}{meant or '; `nopad models` lists them'}")
    if options.json:
        print_summary(json_text(models))
    else:
        print_summary("\n".join(columns([_HEADER, *map(_row, models)])))
    return SUCCESS


_HEADER = ("name", "family", "width", "layers", "patch", "params", "input")


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    """A row that fits 100 columns; the JSON has all of it."""
    rule, *words = model["input"].split()
    numbers = [word for word in words if word.isdigit()]
    if rule == "smart_resize":
        rule, numbers = f"{numbers[0]}+ px", []
    rule = {"longest_edge": "edge", "navit": "max"}.get(rule.rstrip(","), rule)
    return (
        model["name"],
        model["family"],
        str(model["hidden_size"]),
        str(model["layers"]),
        str(model["patch_size"]),
        f"{model['parameters'] / 1e6:,.0f} M",
        " ".join([rule.rstrip(","), *numbers[:1]]),
    )

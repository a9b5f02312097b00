"""The command line: `nopad align`, `nopad embed`, `nopad bench`, `nopad models`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from nopad import __version__
from nopad.align import command as align_command
from nopad.bench import command as bench_command
from nopad.embedding import command as embedding_command
from nopad.terminal import INTERRUPTED, PASSED, WRONG_USE, columns


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
    parser.add_argument("--version", action="version", version=f"nopad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    align = commands.add_parser("align", help="prove that packed features equal the original model's")
    align_command.add_arguments(align)
    align.set_defaults(run=align_command.run)

    embed = commands.add_parser("embed", help="turn folders of pictures into a table of features")
    embedding_command.add_arguments(embed)
    embed.set_defaults(run=embedding_command.run)

    bench = commands.add_parser("bench", help="measure throughput beside the original model's")
    bench_command.add_arguments(bench)
    bench.set_defaults(run=bench_command.run)

    models = commands.add_parser("models", help="list the published models")
    models.add_argument("text", nargs="?", default="", metavar="TEXT", help="list the names that contain it alone")
    models.add_argument("--family", metavar="NAME", help="list one family alone")
    models.add_argument("--json", action="store_true", help="print the list as JSON")
    models.set_defaults(run=run_models)
    return parser


def run_models(options: argparse.Namespace) -> int:
    """`nopad models`."""
    import torch

    from nopad.families import FAMILIES

    families = [family for family in FAMILIES if options.family in (None, family.family)]
    if not families:
        known = ", ".join(family.family for family in FAMILIES)
        raise ValueError(f"--family: expected one of {known}, got {options.family!r}")
    models = []
    for family in families:
        for name in family.published:
            if options.text.lower() not in name.lower():
                continue
            with torch.device("meta"):
                model = family(family.published_config(name))
            models.append(_facts(name, model))
    if not models:
        raise ValueError(f"TEXT: no published name contains {options.text!r}; `nopad models` lists them")
    if options.json:
        print(json.dumps(models, indent=2))
    else:
        print("\n".join(columns([_HEADER, *map(_row, models)])))
    return PASSED


_HEADER = ("name", "family", "width", "layers", "patch", "params", "input")


def _facts(name: str, model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "name": name,
        "family": model.family,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "parameters": model.num_parameters(),
        "input": model.default_preprocessing.describe().split(";")[0],
    }


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    """What fits 100 columns; all of it is in the JSON."""
    rule, *words = model["input"].split()
    numbers = [word for word in words if word.isdigit()]
    return (
        model["name"],
        model["family"],
        str(model["hidden_size"]),
        str(model["layers"]),
        str(model["patch_size"]),
        f"{model['parameters'] / 1e6:,.0f} M",
        " ".join([rule.rstrip(","), *numbers[:1]]),
    )

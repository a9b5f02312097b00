"""`nopad export`."""

from __future__ import annotations

import argparse
import importlib.util

from nopad.command_options import FAILURE, SUCCESS
from nopad.counts import counted
from nopad.extras import install
from nopad.terminal import json_text, print_progress, print_summary, printable

_FORMATS = ("parquet", "lance", "iceberg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad export`."""
    parser.add_argument("folder", metavar="FOLDER", help="a finished table, as `nopad embed --out FOLDER` has made it")
    parser.add_argument("--to", required=True, choices=_FORMATS, help="format; parquet is one file")
    out = "file; folder or address of a Lance dataset; or [CATALOG:]NAMESPACE.TABLE of a catalog of PyIceberg"
    parser.add_argument("--out", required=True, metavar="DATASET", help=out)
    columns = "columns to take, with commas between (default: all)"
    parser.add_argument("--columns", metavar="NAME,…", type=lambda text: text.split(","), help=columns)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Write the rows with features to a new dataset; 0, or 1 where there are none.

    Raises:
        ValueError, OSError, ImportError: see `export_features`.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"this needs pyarrow: {install('embed')}")
    from nopad.search.export import export_features

    print_progress(f"exporting {options.folder} to {options.out}")
    rows = export_features(options.folder, options.out, to=options.to, columns=options.columns)
    text = printable(f"{options.out}: {counted(rows, 'row')}")
    print_summary(json_text({"out": options.out, "rows": rows}) if options.json else text)
    return SUCCESS if rows else FAILURE

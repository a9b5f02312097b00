"""`nopad view`."""

from __future__ import annotations

import argparse
from pathlib import Path

from nopad.command_options import SUCCESS, add_device_options, resolve_device
from nopad.preprocessing.rules import parse_size
from nopad.terminal import configure_transformers, json_text, print_progress, print_summary

DTYPES = ("float32", "bfloat16", "float16")
MAX_PATCHES = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad view`."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files")
    parser.add_argument(
        "--model", required=True, metavar="M[,M2]", help="one or more, side by side, as for nopad embed"
    )
    kinds = "pca, similarity, norms, attention, or several with commas (default: all that the models have)"
    parser.add_argument("--kind", metavar="KIND", help=kinds)
    out = "a page, .html, or a picture, .png (default: view.html)"
    parser.add_argument("--out", default="view.html", metavar="FILE", help=out)
    layers = "layers to step through, as -4,-1, from 0 or from the end (default: the last one)"
    parser.add_argument("--layers", default="-1", metavar="N,…", help=layers)
    size = "of pictures: native (default), model, pixels of the short side, or HEIGHTxWIDTH"
    parser.add_argument("--size", default="native", metavar="SIZE", help=size)
    patches = f"most patches of a picture (default: {MAX_PATCHES} where the size has room for a limit)"
    parser.add_argument("--max-patches", type=int, default=None, metavar="N", help=patches)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_device_options(parser)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.add_argument("--dtype", choices=DTYPES, help="of the models (default: the checkpoint's own)")


def run(options: argparse.Namespace) -> int:
    """Write the page or the picture, and return the exit status.

    Raises:
        ValueError, OSError: wrong use, a picture or a model that cannot be used.
    """
    out = Path(options.out)
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"--out: expected a file .html or .png, got {options.out!r}")
    kinds = None if options.kind is None else options.kind.split(",")
    try:
        layers = [int(layer) for layer in options.layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers: expected numbers as -4,-1, got {options.layers!r}") from None
    size = parse_size(options.size)
    limit = options.max_patches
    if limit is None and size != "model" and not isinstance(size, tuple):
        limit = MAX_PATCHES
    import torch

    from nopad import html
    from nopad.view.page import view_page
    from nopad.view.pictures import check_kinds, sheet, shown_kinds, view_pictures

    check_kinds(kinds)
    configure_transformers()
    pictures = view_pictures(
        options.images,
        options.model.split(","),
        kinds=kinds,
        layers=layers,
        size=size,
        max_patches=limit,
        progress=print_progress,
        revision=options.revision,
        device=resolve_device(options.device),
        attention=options.attention,
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    shown = shown_kinds(pictures, kinds)
    if out.suffix == ".html":
        html.write(view_page(pictures, shown), out)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, shown).save(out)
    if options.json:
        names = {"pictures": options.images, "models": options.model.split(",")}
        print_summary(json_text({"out": str(out), **names, "kinds": shown, "layers": layers}))
    else:
        print_summary(f"{out}: {len(pictures)} picture{'' if len(pictures) == 1 else 's'}, {', '.join(shown)}")
    return SUCCESS

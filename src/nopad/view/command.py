"""`nopad view`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from nopad import html
from nopad.command_options import DTYPES, SUCCESS, add_device_options, add_prefix_option, check_prefix, resolve_device
from nopad.counts import counted
from nopad.extras import install
from nopad.preprocessing.size import parse_size
from nopad.storage.addresses import is_address, local_path
from nopad.terminal import import_transformers, json_text, print_progress, print_summary, printable

MAX_PATCHES = 1024
_IMAGE_OPTIONS = ("kind", "layers", "size", "max_patches", "revision", "device", "attention", "dtype")
_OF_TABLES = ("query", "k", "clusters", "threshold", "map", "thumbnails")


_PAGE = "view.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad view`."""
    sources = "images, to be shown as models see them; or a table, as `nopad embed --out` has made it"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    model = "of images: one or more, side by side, as for nopad embed; of a table: where its model is now"
    parser.add_argument("--model", metavar="M[,M2]", help=model)
    add_prefix_option(parser)
    out = "a page, .html, or for images an image, .png (default: view.html)"
    parser.add_argument("--out", metavar="FILE", help=out)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")

    images = parser.add_argument_group("options for images")
    kinds = "pca, similarity, norms, attention, or several with commas (default: all that the models have)"
    images.add_argument("--kind", metavar="KIND", help=kinds)
    layers = "layers to step through, as -4,-1, from 0 or from the end (default: the last one)"
    images.add_argument("--layers", metavar="N,…", help=layers)
    size = "of images: native (default), model, pixels of the short side, or HEIGHTxWIDTH"
    images.add_argument("--size", metavar="SIZE", help=size)
    patches = f"most patches of an image (default: {MAX_PATCHES} where the size has room for a limit)"
    images.add_argument("--max-patches", type=int, metavar="N", help=patches)
    images.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_device_options(images)
    images.set_defaults(attention=None)
    images.add_argument("--dtype", choices=DTYPES, help="of the models (default: the checkpoint's own)")

    tables = parser.add_argument_group("options for a table")
    query = "words, or the path of an image, whose results are shown; may be given several times"
    tables.add_argument("--query", action="append", metavar="QUERY", help=query)
    tables.add_argument("-k", type=int, metavar="N", help="results of each query (default: 20)")
    tables.add_argument("--clusters", type=int, metavar="N", help="how many (default: by the number of images)")
    threshold = "least cosine of two that count as the same (default: 0.97)"
    tables.add_argument("--threshold", type=float, metavar="COSINE", help=threshold)
    map = "umap or pca (default: umap where umap-learn is installed)"
    tables.add_argument("--map", choices=("pca", "umap"), help=map)
    thumbnails = "images on the page (default: 5000 of a table with thumbnails, else 400)"
    tables.add_argument("--thumbnails", type=int, metavar="N", help=thumbnails)


def run(options: argparse.Namespace) -> int:
    """Write the page or the image, and return the exit status.

    Raises:
        ValueError, OSError: wrong use, an image, a model or a table that cannot be used.
        ImportError: a table, clusters or a map need a package that is not installed.
    """
    if options.out is None:
        if os.path.exists(_PAGE) and not html.is_page(_PAGE):
            raise ValueError(f"--out: {_PAGE} is there and no page of nopad; name another file")
        options.out = _PAGE
    folders = [source for source in options.sources if _is_table(source)]
    if not folders:
        _refuse(options, _OF_TABLES, "is for tables; SOURCE names no folder or address")
        return _run_images(options)
    if len(folders) < len(options.sources):
        other = next(source for source in options.sources if source not in folders)
        raise ValueError(f"SOURCE: expected images or folders of tables, got {other!r} beside {folders[0]!r}")
    _refuse(options, _IMAGE_OPTIONS, f"is for images; {folders[0]!r} is a table")
    return _run_table(options)


def _is_table(source: str) -> bool:
    """Whether a source is a folder or an address: images are files of this machine."""
    path = local_path(source)
    return os.path.isdir(path) or is_address(path)


def _refuse(options: argparse.Namespace, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}"
            raise ValueError(f"{option}: {why}")


def _run_images(options: argparse.Namespace) -> int:
    if options.model is None:
        raise ValueError("--model: expected the models that see the images, as for nopad embed, got none")
    out = Path(options.out)
    if out.suffix not in (".html", ".png"):
        raise ValueError(f"--out: expected a file .html or .png, got {options.out!r}")
    kinds = None if options.kind is None else options.kind.split(",")
    layers, size = _layers(options.layers or "-1"), parse_size(options.size or "native")
    import torch

    import_transformers()
    from nopad.view.images import check_kinds, sheet, shown_kinds, view_images
    from nopad.view.page import view_page

    check_kinds(kinds)
    images = view_images(
        options.sources,
        options.model.split(","),
        kinds=kinds,
        layers=layers,
        size=size,
        max_patches=_max_patches(options.max_patches, size),
        progress=print_progress,
        revision=options.revision,
        prefix=options.prefix,
        device=resolve_device(options.device),
        attention=options.attention or "auto",
        dtype=None if options.dtype is None else getattr(torch, options.dtype),
    )
    shown = shown_kinds(images, kinds)
    if out.suffix == ".html":
        html.write(view_page(images, shown), out)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet(images, shown).save(out)
    if options.json:
        names = {"pictures": options.sources, "models": options.model.split(",")}
        print_summary(json_text({"out": str(out), **names, "kinds": shown, "layers": layers}))
    else:
        print_summary(f"{out}: {counted(len(images), 'image')}, {', '.join(shown)}")
    return SUCCESS


def _layers(numbers: str) -> list[int]:
    try:
        return [int(layer) for layer in numbers.split(",")]
    except ValueError:
        raise ValueError(f"--layers: expected numbers as -4,-1, got {numbers!r}") from None


def _max_patches(limit: int | None, size: Any) -> int | None:
    """The limit of an image's patches; `MAX_PATCHES` by default where the size has room for one."""
    return MAX_PATCHES if limit is None and size != "model" and not isinstance(size, tuple) else limit


def _run_table(options: argparse.Namespace) -> int:
    if Path(options.out).suffix != ".html":
        raise ValueError(f"--out: expected a file .html, got {options.out!r}")
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"this needs pyarrow: {install('embed')}")
    import_transformers()
    from nopad.embedding.table.paths import table_path
    from nopad.search.query import load_encoder
    from nopad.search.reading import read_features
    from nopad.view.collection import collect
    from nopad.view.collection_page import collection_page

    for folder in options.sources:
        table_path("SOURCE", folder)
    check_prefix(options)
    features = read_features(options.sources)
    arguments: dict[str, Any] = {"clusters": options.clusters, "threshold": options.threshold, "map": options.map}
    if options.model is not None:
        if not options.query:
            raise ValueError("--model: a table is shown without its model unless there is a --query")
        arguments["encoder"] = load_encoder(features.metadata, model=options.model, prefix=options.prefix)
    queries, k = options.query or [], 20 if options.k is None else options.k
    if options.k is not None and not queries:
        raise ValueError("-k: expected a --query whose results it counts, got none")
    collection = collect(
        features, queries=queries, k=k, thumbnails=options.thumbnails, progress=print_progress, **arguments
    )
    html.write(collection_page(collection), options.out)
    summary = {
        "out": options.out,
        "pictures": len(features),
        "failures": len(features.failures),
        "clusters": None if collection.clusters is None else len(collection.clusters),
        "duplicates": None if collection.duplicates is None else len(collection.duplicates),
        "thumbnails": len(collection.thumbnails),
        "left_out": collection.left_out,
    }
    if options.json:
        print_summary(json_text(summary))
    else:
        lines = [f"{options.out}: {counted(len(features), 'image')}, {counted(len(features.failures), 'failure')}"]
        print_summary("\n".join(map(printable, [*lines, *(f"left out: {each}" for each in collection.left_out)])))
    return SUCCESS

"""`nopad search`, `nopad duplicates`, `nopad clusters` and `nopad index`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nopad import html
from nopad.command_options import FAILURE, SUCCESS, add_prefix_option, check_prefix, check_report
from nopad.counts import counted
from nopad.extras import install
from nopad.local_paths import check_local
from nopad.preprocessing.formats import image_suffixes
from nopad.terminal import columns, import_transformers, json_text, print_progress, print_summary, printable

if TYPE_CHECKING:
    from nopad.search.features import Features, Group

MANY_ROWS = 1_000_000
_SHOWN = 5


def add_commands(commands: Any) -> None:
    """The four commands."""
    search = commands.add_parser("search", help="search a table of features by words or an image")
    _add_table(search)
    search.add_argument("query", nargs="?", metavar="QUERY", help="words, or the path of an image")
    search.add_argument("--text", help="words, also where a file is called so")
    search.add_argument("--image", metavar="FILE", help="path of an image")
    search.add_argument("--id", help="of a row of the table: what is like it")
    search.add_argument("-k", type=int, default=20, metavar="N", help="how many (default: 20)")
    search.add_argument("--model", help="where the model that made the table is now, if not where it was")
    add_prefix_option(search)
    search.add_argument("--exact", action="store_true", help="compare every row, also where there is an index")
    _add_output(search)
    search.set_defaults(run=run_search)

    duplicates = commands.add_parser("duplicates", help="find images that are nearly the same")
    _add_table(duplicates)
    help = "least cosine of two that count as the same (default: 0.97)"
    duplicates.add_argument("--threshold", type=float, default=0.97, metavar="COSINE", help=help)
    _add_output(duplicates)
    duplicates.set_defaults(run=run_duplicates)

    clusters = commands.add_parser("clusters", help="group images by what they show")
    _add_table(clusters)
    clusters.add_argument("-k", type=int, required=True, metavar="N", help="how many groups")
    clusters.add_argument("--seed", type=int, default=0, metavar="N", help="of the first centres (default: 0)")
    _add_output(clusters)
    clusters.set_defaults(run=run_clusters)

    index = commands.add_parser("index", help="build an index beside a table of millions of rows")
    _add_table(index)
    help = "share of the 10 nearest rows to be found (default: 0.95)"
    index.add_argument("--recall", type=float, default=0.95, metavar="SHARE", help=help)
    index.set_defaults(run=run_index)


def _add_table(parser: argparse.ArgumentParser) -> None:
    help = "a table, as `nopad embed --out` has made it: a folder, or its address in a store"
    parser.add_argument("folder", metavar="FOLDER", help=help)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--html", metavar="FILE.html", help="write a page with the images")


def _open(options: argparse.Namespace) -> Features:
    for package in ("pyarrow",):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: {install('embed')}")
    check_report(getattr(options, "html", None))
    import_transformers()
    from nopad.search.reading import read_features

    return read_features(options.folder)


def run_search(options: argparse.Namespace) -> int:
    """Print the best rows, and return 0, or 1 where the table has none.

    Raises:
        ValueError, OSError, ImportError: see `Features.search`.
    """
    kind, query = _query(options)
    features = _open(options)
    from nopad.search.query import load_encoder

    arguments: dict[str, Any] = {kind: query, "k": options.k, "exact": options.exact}
    check_prefix(options)
    if options.model is not None:
        arguments["encoder"] = load_encoder(features.metadata, model=options.model, prefix=options.prefix)
    if len(features) > MANY_ROWS and (options.exact or features.index is None):
        print_progress(f"comparing {len(features):,} rows; `nopad index {options.folder}` makes this faster")
    matches = features.search(**arguments)
    shown = [{"id": m.id, "source": m.source, "score": m.score, "path": _path(features, m.row)} for m in matches]

    def lines() -> str:
        rows = [(f"{match['score']:z.3f}", _name(match["path"], match["id"])) for match in shown]
        return "\n".join(columns([("cosine", "image"), *rows])) if rows else "no rows"

    def page() -> str:
        from nopad.search.page import matches_page

        return matches_page(features, query, matches)

    _print(options, {"query": {kind: query}, "matches": shown}, lines, page)
    return SUCCESS if shown else FAILURE


def _query(options: argparse.Namespace) -> tuple[str, str]:
    """Which argument of `Features.search` the query is, and the query.

    Raises:
        ValueError: none, several, or an empty one.
    """
    sources = {"query": options.query, "text": options.text, "image": options.image, "id": options.id}
    queries = {kind: value for kind, value in sources.items() if value is not None}
    if len(queries) != 1:
        got = f"{len(queries)}: {', '.join(queries)}" if queries else "none"
        raise ValueError(f"QUERY: expected words, the path of an image, or one of --text, --image, --id, got {got}")
    [(kind, value)] = queries.items()
    if not value.strip():
        raise ValueError(f"QUERY: expected words or the path of an image, got {value!r}")
    if kind == "query":
        kind = "image" if os.path.isfile(value) else "text"
        if kind == "text" and os.path.splitext(value)[1].lower() in image_suffixes():
            raise ValueError(
                f"QUERY: there is no file {value!r}; --text searches for words that end like a file's name"
            )
    if kind == "image":
        check_local("QUERY", value)
    return kind, value


def run_duplicates(options: argparse.Namespace) -> int:
    """Print the groups of images that are nearly the same, and return 0."""
    features = _open(options)
    groups = features.duplicates(options.threshold)
    extra = sum(map(len, groups)) - len(groups)
    title = f"{counted(len(groups), 'group')} of nearly the same image, {counted(extra, 'image')} more than one of each"
    _print_groups(options, features, title, "group", groups)
    return SUCCESS


def run_clusters(options: argparse.Namespace) -> int:
    """Print the clusters, and return 0."""
    features = _open(options)
    groups = features.clusters(options.k, seed=options.seed)
    _print_groups(options, features, f"{len(groups):,} clusters", "cluster", groups)
    return SUCCESS


def run_index(options: argparse.Namespace) -> int:
    """Build the index, and return 0."""
    features = _open(options)
    index = features.build_index(recall=options.recall, progress=print_progress)
    looks = f"looks into {index.num_probes:,} of {index.ivf.nlist:,} lists"
    print_summary(f"{options.folder}: an index of {index.num_rows:,} rows, recall at 10 {index.recall:.3f}, {looks}")
    return SUCCESS


def _print_groups(
    options: argparse.Namespace, features: Features, title: str, kind: str, groups: Sequence[Group]
) -> None:
    def lines() -> str:
        parts = [title]
        for number, group in enumerate(groups, 1):
            more = ["…"] if len(group) > _SHOWN else []
            names = [printable(_name(_path(features, row), features.ids[row])) for row in group.rows[:_SHOWN]]
            parts += [
                "",
                f"{kind} {number}, {counted(len(group), 'image')}",
                *(f"  {name}" for name in [*names, *more]),
            ]
        return "\n".join(parts)

    def page() -> str:
        from nopad.search.page import groups_page

        return groups_page(features, title, kind, groups)

    content = [[{"id": features.ids[row], "path": _path(features, row)} for row in group.rows] for group in groups]
    _print(options, {f"{kind}s": content}, lines, page)


def _name(path: str | None, id: str) -> str:
    """An image by its path, with the part of its video, such as `#t=2`."""
    video, part, span = id.rpartition("#t=")
    return id if path is None else f"{path}{part}{span}" if video and path.endswith(video) else path


def _path(features: Features, row: int) -> str | None:
    try:
        return features.path(int(row))
    except (ValueError, OSError):  # shards without the list of inputs
        return None


def _print(
    options: argparse.Namespace, content: dict[str, Any], lines: Callable[[], str], page: Callable[[], str]
) -> None:
    if options.html is not None:
        html.write(page(), options.html)
    print_summary(json_text(content) if options.json else lines())

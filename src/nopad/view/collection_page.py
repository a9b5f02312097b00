"""The page of a table: a map to explore, results, duplicates, clusters, failures; one file without a network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from nopad import html
from nopad.counts import counted
from nopad.search.features import Features
from nopad.terminal import printable
from nopad.view.collection import CLUSTER_SHOWN, DUPLICATES_SHOWN, MAX_GROUPS, Collection, shown_failures

MAX_COLUMN_BYTES = 8_000_000
"""Bytes of all columns on a page; further ones are left out."""
MAX_VALUE = 200
"""Characters of a value."""
MAX_REASONS, MAX_NAMES = 50, 100
_STYLE = """<style>
.sections { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .875rem; margin: .75rem 0 }
.sections a, summary { color: inherit } h3 { font-size: .9375rem; font-weight: 550; margin: 1.25rem 0 .5rem }
main { max-width: 90rem } section { scroll-margin-top: 1rem }
.controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; padding: .5rem 0; font-size: .875rem }
.controls input[type=search] { width: min(16rem, 60vw) } button, input { font: inherit; color: inherit }
.controls input[type=search], .controls button { background: none; border: 1px solid var(--muted);
  border-radius: 3px; padding: .15rem .5rem; min-height: 2rem } .controls button { min-width: 2rem; cursor: pointer }
.explorer { display: grid; grid-template-columns: minmax(0, 1fr) 20rem; gap: 1rem; align-items: start }
#map { width: 100%; height: clamp(20rem, 70vh, 50rem); display: block; touch-action: none; cursor: crosshair;
  border: 1px solid var(--rule); border-radius: 3px }
.panel { max-height: clamp(20rem, 70vh, 50rem); overflow-y: auto; scrollbar-width: thin }
@media (max-width: 52rem) { .explorer { grid-template-columns: minmax(0, 1fr) } .panel { max-height: none }
  #map { height: 60vh } }
.panel > figure img { aspect-ratio: auto; object-fit: contain; max-height: 16rem; background: none;
  object-position: left; width: auto; max-width: 100% }
.panel dl { display: block; margin: .5rem 0 } .panel dl div { padding: .15rem 0; font-size: .8125rem }
.near { list-style: none; display: grid; gap: .75rem .5rem;
  grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) }
.pick { display: grid; align-content: start; gap: .25rem; width: 100%; border: 0; background: none; padding: 0;
  cursor: pointer; text-align: left; font-size: .75rem; line-height: 1.35 }
.pick span { color: var(--muted); display: block }
.pick img, .pick i { width: 100%; aspect-ratio: 1; object-fit: cover; background: var(--rule); border-radius: 3px }
.gallery { grid-template-columns: repeat(auto-fill, minmax(min(8rem, 40vw), 1fr)) }
.groups > li { margin-bottom: 1.5rem } .groups, .reasons, .legend2 { list-style: none }
.legend2 { display: flex; flex-wrap: wrap; gap: .25rem .75rem; padding: .5rem 0 } .legend2 button { border: 0;
  background: none; cursor: pointer; padding: .15rem 0; font-size: .8125rem }
.legend2 button[aria-pressed=true] { text-decoration: underline; font-weight: 650 }
.legend2 i { display: inline-block; width: .75rem; height: .75rem; border-radius: 50%; margin-right: .35rem;
  vertical-align: -.1rem } .reasons summary { cursor: pointer; padding: .25rem 0 } .reasons ul { padding-left: 1.25rem }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px }
</style>"""


def collection_page(collection: Collection) -> str:
    """The whole page."""
    features = collection.features
    title = f"{counted(len(features), 'image')} by {features.metadata.get('model', 'models of several names')}"
    sections = list(_sections(collection))
    links = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for name, heading, _ in sections)
    parts = [_STYLE, html.element("h1", title), f'<nav class="sections">{links}</nav>']
    if collection.left_out:
        parts.append(html.element("p", f"Not on this page: {'; '.join(collection.left_out)}."))
    parts += [f'<section id="{name}">{html.element("h2", heading)}{body}</section>' for name, heading, body in sections]
    parts.append("<noscript><p>This page shows its images with JavaScript.</p></noscript>")
    parts += [html.data(_data(collection)), html.script("nopad.view", "collection.js")]
    return html.page(title, parts)


def _sections(collection: Collection) -> Iterable[tuple[str, str, str]]:
    """Name, heading and content of each section."""
    features = collection.features
    yield "collection", "Map", _map(collection)
    for number, (query, matches) in enumerate(collection.results):
        images = ((match.row, f"{match.score:z.3f}") for match in matches)
        yield f"results-{number}", f"Results: {query}", _gallery(collection, images)
    groups = collection.duplicates
    if groups:
        extra = sum(map(len, groups)) - len(groups)
        words = f"{counted(len(groups), 'group')}, {counted(extra, 'image')} more than one of each"
        items = [_gallery(collection, _rows(group.rows, DUPLICATES_SHOWN)) for group in islice(groups, MAX_GROUPS)]
        yield "duplicates", "Duplicates", _listed(f"{words}{_first(len(groups), MAX_GROUPS)}", items)
    if collection.clusters:
        items = [
            html.element("h3", f"Cluster {number}: {counted(len(group), 'image')}")
            + _gallery(collection, _rows(group.rows, CLUSTER_SHOWN))
            for number, group in enumerate(collection.clusters, 1)
        ]
        yield "clusters", "Clusters", _listed("The images nearest to the centre of each", items)
    if features.failures:
        yield "failures", "Failures", _failures(features)


def _map(collection: Collection) -> str:
    label = (
        f"Map of {counted(len(collection.rows), 'image')}. Arrow keys choose an image, with shift they move the "
        f"map; plus and minus zoom, 0 shows all, escape chooses none."
    )
    buttons = "".join(
        f'<button type="button" id="{name}" aria-label="{words}">{text}</button>'
        for name, words, text in (("in", "zoom in", "+"), ("out", "zoom out", "−"), ("all", "show all", "all"))
    )
    legend = "".join(
        f'<li><button type="button" data-cluster="{number}" aria-pressed="false"><i></i>{number + 1}</button></li>'
        for number in range(len(collection.clusters or ()))
    )
    clusters = f'<ul class="legend2" aria-label="clusters">{legend}</ul>' if legend else ""
    return (
        f"{html.element('p', collection.map + '.')}"
        f'<form class="controls"><label>find <input type="search" id="find" autocomplete="off"></label>'
        f'<output id="found" aria-live="polite"></output>{buttons}'
        f'<label><input type="checkbox" id="pictures" checked> images</label></form>'
        f'<div class="explorer"><canvas id="map" tabindex="0" role="application" aria-label="{html.escape(label)}">'
        f'</canvas><div class="panel" id="panel"><p>Choose an image on the map.</p></div></div>{clusters}'
    )


def _listed(words: str, items: Sequence[str]) -> str:
    return f'{html.element("p", words + ".")}<ul class="groups">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _first(number: int, shown: int) -> str:
    return f"; the first {shown:,} are shown" if number > shown else ""


def _rows(rows: np.ndarray, number: int) -> Iterable[tuple[int, str]]:
    return ((int(row), "") for row in rows[:number])


def _gallery(collection: Collection, images: Iterable[tuple[int, str]]) -> str:
    """Images that choose themselves on the map, each with a line below its name."""
    features, figures = collection.features, []
    for row, note in images:
        height, width = features.sizes[row]
        place = int(np.searchsorted(collection.rows, row))
        lines = [line for line in (note, f"{width} × {height}") if line]
        notes = "".join(html.element("span", line) for line in lines)
        figures.append(
            f'<button type="button" class="pick" data-place="{place}">'
            f"<div>{html.escape(features.ids[row])}{notes}</div></button>"
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def _failures(features: Features) -> str:
    reasons = shown_failures(features, MAX_NAMES)
    items = []
    for reason, number, names in islice(reasons, MAX_REASONS):
        listed = "".join(html.element("li", name) for name in names)
        heading = html.element("summary", f"{number:,}: {reason}{_first(number, MAX_NAMES)}")
        items.append(f"<li><details>{heading}<ul>{listed}</ul></details></li>")
    words = f"{len(features.failures):,} without features, by reason{_first(len(reasons), MAX_REASONS)}"
    return f'{html.element("p", words + ".")}<ul class="reasons">{"".join(items)}</ul>'


def _data(collection: Collection) -> dict[str, Any]:
    features, rows = collection.features, collection.rows
    place = {int(row): number for number, row in enumerate(rows)}
    levels = np.rint(collection.places.clip(0, 1) * 65535).astype("<u2")
    return {
        "number": len(rows),
        "places": _text(levels),
        "labels": _text(np.where(collection.labels < 0, 255, collection.labels).astype(np.uint8)),
        "clusters": len(collection.clusters or ()),
        "directions": _text(collection.directions),
        "width": features.embeddings.shape[1],
        "ids": [printable(features.ids[row]) for row in rows],
        "sizes": _text(features.sizes[rows].clip(0, 2**31 - 1).astype("<i4")),
        "columns": _columns(features, rows),
        "thumbnails": {place[row]: base64.b64encode(jpeg).decode() for row, jpeg in collection.thumbnails.items()},
    }


def _columns(features: Features, rows: np.ndarray) -> Mapping[str, list[str]]:
    """The columns that are texts, numbers or times, as text, while there is room for them."""
    columns, room = {}, MAX_COLUMN_BYTES
    for name in features.columns.column_names:
        column = features.columns[name]
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            continue
        texts = ["" if value is None else printable(str(value)[:MAX_VALUE]) for value in column.take(rows).to_pylist()]
        room -= sum(map(len, texts))
        if room < 0:
            break
        columns[printable(name)] = texts
    return columns


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()

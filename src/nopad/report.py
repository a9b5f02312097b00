"""Reports as one HTML page: no scripts, nothing fetched, light and dark. Everything that comes in is escaped here."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nopad.align import AlignReport, CaseResult

CHART_WIDTH, CHART_HEIGHT = 960, 280
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 22, 48
COLOURS, DASHES = 6, 3

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1d1f22; --muted: #5f646c; --rule: #e3e3de; --bar: #5d83ad;
  --good: #1b7a49; --bad: #b3261e; --s0: #2f6db5; --s1: #bd6227; --s2: #35855a; --s3: #8a56a8; --s4: #857316;
  --s5: #2f8592 }
@media (prefers-color-scheme: dark) { :root { --paper: #141517; --ink: #e7e7e3; --muted: #a0a4ac; --rule: #2d3034;
  --bar: #6f95c0; --good: #63cc93; --bad: #ff8d83; --s0: #7db2f0; --s1: #eb9f68; --s2: #74c69d; --s3: #c79be0;
  --s4: #d1bf5e; --s5: #74c3cf } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100% }
main { max-width: 66rem; margin: 0 auto; padding: clamp(1.5rem, 5vw, 4rem) clamp(1rem, 4vw, 2.5rem) 5rem }
h1, h2, p, dl, dd, ul, figure { margin: 0; padding: 0 }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.25rem); line-height: 1.2; font-weight: 650; letter-spacing: -.015em;
  text-wrap: balance }
h2 { font-size: 1.125rem; font-weight: 650; margin: 3.25rem 0 .25rem }
.eyebrow, .lead, caption, dt, thead, .legend, footer { color: var(--muted); font-size: .875rem }
.eyebrow { margin-bottom: .5rem; overflow-wrap: anywhere }
.lead { max-width: 44rem; margin-bottom: 1rem }
.good { color: var(--good) } .bad { color: var(--bad) }
dl.figures { display: flex; flex-wrap: wrap; gap: 1rem 3rem; margin-top: 1.5rem }
dl.figures dd { font-size: 1.25rem; line-height: 1.4; white-space: nowrap }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2.5rem }
dl.facts div { display: grid; grid-template-columns: 7rem 1fr; align-items: baseline; gap: 1rem; padding: .45rem 0;
  border-bottom: 1px solid var(--rule) }
dd { overflow-wrap: anywhere }
dl.facts dd { font-size: .9375rem }
.scroll { overflow-x: auto; scrollbar-width: thin }
.scroll:focus-visible { outline: 2px solid var(--s0); outline-offset: 3px }
table { width: 100%; border-collapse: collapse; font-size: .875rem; line-height: 1.4 }
caption { text-align: left; padding-bottom: .75rem }
th, td { padding: .5rem .6rem; text-align: right; white-space: nowrap; vertical-align: baseline }
thead th { font-weight: 500; padding-block: .2rem } thead tr:last-child th { padding-bottom: .45rem }
th[scope=colgroup] { text-align: center }
tbody tr { border-top: 1px solid var(--rule) } tbody tr.note { border: 0 }
tr > :first-child { text-align: left; padding-left: 0 } tr > :last-child { padding-right: 0 }
tbody th { font-weight: 550; white-space: normal; min-width: 9.5rem; position: sticky; left: 0;
  background: var(--paper) }
.status { text-align: left }
.note td { padding-top: 0; color: var(--bad); white-space: normal }
.note ul { list-style: none; position: sticky; left: 0; width: fit-content; max-width: calc(100vw - 2rem) }
.plain { padding-left: 1.1rem }
svg.chart { display: block; width: 100%; min-width: 44rem; height: auto; font-size: 12.5px }
svg text { fill: var(--muted) } svg .grid { stroke: var(--rule) } svg .value { fill: var(--ink); font-size: 12px }
svg .bar { fill: var(--bar) } svg .bar.over { fill: var(--bad) } g:hover > .bar { opacity: .75 }
svg .limit { stroke: var(--bad); stroke-dasharray: 4 4 } svg text.limit { fill: var(--bad); stroke: none }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round }
g:hover > .line { stroke-width: 3 }
.d1 { stroke-dasharray: 6 4 } .d2 { stroke-dasharray: 1 4 }
.legend { list-style: none; display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: .3rem 2rem; margin-top: .9rem }
.legend li { display: grid; grid-template-columns: 1.5rem 1fr auto; gap: .6rem; align-items: center }
.legend b { color: var(--ink); font-weight: 500 } svg.key { width: 1.5rem; height: .5rem }
""" + "\n".join(f".c{i} {{ stroke: var(--s{i}) }} .dot.c{i} {{ fill: var(--s{i}) }}" for i in range(COLOURS))

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


@dataclass(frozen=True)
class Row:
    """One row of a table: a cell for each column, and remarks below it across the table."""

    cells: tuple[str, ...]
    passed: bool | None = None
    notes: tuple[str, ...] = ()


def page(title: str, parts: Iterable[str]) -> str:
    """The page around parts that are HTML already."""
    return PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(parts))


def section(heading: str, lead: str, *parts: str) -> str:
    """A heading, a sentence below it, and parts that are HTML already."""
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", _element("p", "lead", lead), *parts, "</section>"])


def pairs(items: Iterable[tuple[str, str]], kind: str) -> str:
    """A description list: `kind` is `facts`, a quiet grid, or `figures`, a few large numbers."""
    rows = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items)
    return f'<dl class="{kind}">\n{rows}\n</dl>'


def table(caption: str, columns: Sequence[tuple[str, str]], rows: Iterable[Row]) -> str:
    """A table whose first column names the row.

    Args:
        caption: what the rows are.
        columns: `(group, header)`; neighbours of one group share its heading, `""` is no group.
        rows: where `passed` is set, the second column takes its colour.
    """
    groups: list[tuple[str, int]] = []
    for group, _ in columns:
        if groups and group and groups[-1][0] == group:
            groups[-1] = (group, groups[-1][1] + 1)
        else:
            groups.append((group, 1))
    top = "".join(
        f'<th scope="colgroup" colspan="{n}">{escape(group)}</th>' if group else "<td></td>" for group, n in groups
    )
    judged = any(row.passed is not None for row in (rows := list(rows)))
    kinds = ["", "status" if judged else "", *[""] * len(columns)]
    heads = "".join(f'<th scope="col" class="{kind}">{escape(h)}</th>' for (_, h), kind in zip(columns, kinds))  # noqa: B905
    body = []
    for row in rows:
        tone = {True: "status good", False: "status bad", None: ""}[row.passed]
        cells = [_element("td", tone if i == 0 else "", cell) for i, cell in enumerate(row.cells[1:])]
        body.append(f'<tr><th scope="row">{escape(row.cells[0])}</th>{"".join(cells)}</tr>')
        if row.notes:
            notes = "".join(_element("li", "", note) for note in row.notes)
            body.append(f'<tr class="note"><td colspan="{len(columns)}"><ul>{notes}</ul></td></tr>')
    head = f"<thead>\n<tr>{top}</tr>\n<tr>{heads}</tr>\n</thead>" if any(g for g, _ in groups) else f"<thead><tr>{heads}</tr></thead>"
    return _scroll(caption, f"<table>\n{_element('caption', '', caption)}\n{head}\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>")

"""Parts of a page: nothing fetched, light and dark. Every text is escaped here, see `escape` and `data`."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape as escape_html
from importlib import resources
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from nopad.atomic import atomic_write
from nopad.terminal import printable

LEFT, RIGHT, TOP, BASE = 84, 940, 22, 232  # the plot within a chart 960 wide
COLOURS, DASHES = 4, 3

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
"""Content-Security-Policy: a browser fetches nothing for a page, whatever it holds."""
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="nopad"><meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title><style>
$style</style></head><body><main>
$body</main></body></html>
""")


def escape(text: str) -> str:
    """`text` for an element or an attribute, with control characters escaped as on a terminal."""
    return escape_html(printable(text))


def page(title: str, parts: Iterable[str]) -> str:
    """The page around parts that are HTML already."""
    style = resources.files("nopad").joinpath("page.css").read_text(encoding="utf-8")
    return PAGE.substitute(title=escape(title), style=style, body="\n".join(parts), policy=_POLICY)


def is_page(path: str | Path) -> bool:
    """Whether a file is a page that `page` made."""
    with open(path, "rb") as file:
        return b'<meta name="generator" content="nopad">' in file.read(1 << 10)


def data(value: Any) -> str:
    """A value as JSON that scripts read; no text in it ends its element."""
    text = json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script id="data" type="application/json">{text}</script>'


def script(package: str, name: str) -> str:
    """A script of this project's own, which stands behind the data that it reads."""
    return f"<script>{resources.files(package).joinpath(name).read_text(encoding='utf-8')}</script>"


def write(html: str, path: str | Path) -> None:
    """Write a page as UTF-8, all of it or nothing; directories are made. A pipe or the like is written to and stays.

    Raises:
        OSError: as the system raises it, with `path` as its file name.
    """
    try:
        _write(html, Path(path).resolve())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(html: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_bytes(html.encode("utf-8", "backslashreplace"))
        return
    with atomic_write(path) as file:
        file.write(html.encode("utf-8", "backslashreplace"))  # paths that are not UTF-8 come with surrogates


def jpeg(image: Any, side: int, quality: int) -> bytes:
    """A Pillow image of at most `side` pixels a side, encoded; the image itself is not changed."""
    image = image.copy()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def section(heading: str, *parts: str) -> str:
    """A heading and parts that are HTML already."""
    return "\n".join(["<section>", element("h2", heading), *parts, "</section>"])


def element(tag: str, text: str, kind: str = "") -> str:
    """Text in a tag."""
    return f'<{tag} class="{kind}">{escape(text)}</{tag}>' if kind else f"<{tag}>{escape(text)}</{tag}>"


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Names and their values."""
    return "<dl>" + "\n".join(f"<div>{element('dt', k)}{element('dd', v)}</div>" for k, v in items) + "</dl>"


def table(caption: str, header: Sequence[str], rows: Iterable[tuple[Sequence[str], bool | None, Sequence[str]]]) -> str:
    """A table whose rows are `(cells, passed, remarks)`; the first cell names the row, the second is its result.

    `passed` is `None` where there was nothing to pass.
    """
    titles = ("\n".join(map(escape, title.split("\n"))) for title in header)
    heads = [f'<th scope="col"{" class=status" if i == 1 else ""}>{title}</th>' for i, title in enumerate(titles)]
    lines = [element("caption", caption), f"<thead><tr>{''.join(heads)}</tr></thead>", "<tbody>"]
    labels = [escape(title.replace("\n", " ")) for title in header[2:]]  # where a narrow page stacks the cells of a row
    for (name, result, *cells), passed, remarks in rows:
        kind = "idle" if passed is None else "good" if passed else "bad"
        status = element("td", result, f"status {kind}")
        labelled = zip(labels, cells, strict=True)
        cells = "".join(f'<td data-label="{label}">{escape(cell)}</td>' for label, cell in labelled)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{status}{cells}</tr>')
        if remarks:
            notes = "".join(element("li", remark) for remark in remarks)
            lines.append(f'<tr class="note {kind}"><td colspan="{len(header)}"><ul>{notes}</ul></td></tr>')
    return _scroll(caption, "<table>" + "\n".join(lines) + "</tbody></table>")


def gallery(images: Iterable[tuple[bytes, str, Sequence[str]]], *, whole: bool = False) -> str:
    """Images beside each other, each a JPEG (`b""` for none), a name and lines below it.

    They are cut to squares, unless `whole`.
    """
    return f'<div class="gallery{" whole" if whole else ""}">' + "\n".join(map(_figure, images)) + "</div>"


def _figure(entry: tuple[bytes, str, Sequence[str]]) -> str:
    data, name, lines = entry
    notes = "".join(element("span", line) for line in lines)
    caption = f"<figcaption>{escape(name)}{notes}</figcaption>"
    source = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{source}" alt="{escape(name)}" loading="lazy">' if data else "<div></div>"
    return f"<figure>{image}{caption}</figure>"


def line_chart(
    label: str, lines: Sequence[tuple[str, Sequence[float]]], x_label: str, *, minima: Sequence[float] = ()
) -> str:
    """Lines over 0, 1, 2, …: log axis, zeros on its floor, gaps at NaN and infinity; a legend has each one's end.

    A line called `"limit"` is drawn as one; the area between the first line and `minima` is a band.
    """
    values = [value for _, line in [*lines, ("", minima)] for value in line]
    positive = [math.log10(value) for value in values if 0 < value < math.inf]
    low = math.floor(min(positive, default=-8))
    high = max(math.ceil(max(positive, default=low)), low + 1)
    low -= (zero := 0 in values)
    last = max([1, *(len(line) - 1 for _, line in lines)])
    x, y = _scale(0, last, LEFT, RIGHT), _scale(low, high, BASE, TOP)
    marks = [_text(x(i), BASE + 26, str(i)) for i in _powers(0, last, 16)]
    for power in _powers(low, high, 7):
        number = "0" if zero and power == low else f"1e{power}"
        marks += [_line(LEFT, y(power), RIGHT, y(power), "grid"), _text(LEFT - 10, y(power) + 4, number, anchor="end")]
    heights = [
        [y(math.log10(v) if v > 0 else low) if math.isfinite(v) else None for v in line]
        for line in [*(line for _, line in lines), minima]
    ]
    marks += _band(x, heights[0], heights.pop()) if lines else []
    ends = [scientific(line[-1]) if line else "none" for _, line in lines]
    return _with_lines(label, marks, x_label, x, zip((name for name, _ in lines), heights, ends, strict=True))


def share_chart(
    label: str, ticks: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None]]], x_label: str
) -> str:
    """Shares over named steps: linear axis from 0 to at least 1, gaps at `None`; a legend has each one's largest."""
    top = math.ceil(5 * max([1, *(share for _, line in lines for share in line if share is not None)])) / 5
    x, y = _scale(0, max(1, len(ticks) - 1), LEFT, RIGHT), _scale(0, top, BASE, TOP)
    # At the ends of the plot half a label would be cut off.
    sides = ["start", *["middle"] * (len(ticks) - 2), "end"] if len(ticks) > 1 else ["start"]
    marks = [_text(x(i), BASE + 26, tick, anchor=side) for i, (tick, side) in enumerate(zip(ticks, sides, strict=True))]
    for fifth in range(1 + round(5 * top)):
        marks += [_line(LEFT, y(fifth / 5), RIGHT, y(fifth / 5), "grid")]
        marks += [_text(LEFT - 10, y(fifth / 5) + 4, f"{fifth / 5:.1f}", anchor="end")]
    heights = [[None if share is None else y(share) for share in line] for _, line in lines]
    largest = [max((share for share in line if share is not None), default=None) for _, line in lines]
    ends = ["none" if share is None else f"{share:.2f}" for share in largest]
    return _with_lines(label, marks, x_label, x, zip((name for name, _ in lines), heights, ends, strict=True))


def bars(label: str, items: Sequence[tuple[str, float, float, float, str, bool]], unit: str) -> str:
    """One bar below the other, each `(name, value, low, high, text, right)`.

    A line shows the spread from `low` to `high`; bars that are not `right` are red.
    """
    top = max([high for _, _, _, high, _, _ in items if high > 0], default=1.0)
    rows = []
    for name, value, low, high, text, right in items:
        drawn = f'<i class="{"bar" if right else "bar over"}" style="width:{value / top:.2%}"></i>'
        drawn += f'<i class="spread" style="left:{low / top:.2%};width:{(high - low) / top:.2%}"></i>'
        track = f'<span class="track" aria-hidden="true">{drawn}</span>'
        rows.append(f"<li>{element('span', name, 'name')}{track}{element('b', text)}</li>")
    rows.append(f"<li>{element('span', unit, 'unit')}</li>")
    return f'<ul class="chart bars" aria-label="{escape(label)}">' + "\n".join(rows) + "</ul>"


def scientific(value: float | None, digits: int = 1) -> str:
    """An error: `3.2e-08`, `0`, `NaN`, or `–` for none."""
    return "–" if value is None else "NaN" if math.isnan(value) else "0" if value == 0 else f"{value:.{digits}e}"


def near_one(cosine: float | None) -> str:
    """A cosine: `0.987654`, and `1 − 3.2e-08` where six digits would hide the distance."""
    if cosine is None or not 0 < abs(1 - cosine) < 1e-5:
        return "–" if cosine is None else "1" if cosine == 1 else "NaN" if math.isnan(cosine) else f"{cosine:.6f}"
    return f"1 {'−' if cosine < 1 else '+'} {abs(1 - cosine):.1e}"


def _scroll(label: str, inner: str) -> str:
    # tabindex: it scrolls from the keyboard too.
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n{inner}\n</div>'


def _chart(label: str, marks: Iterable[str], x_label: str) -> str:
    frame = [_line(LEFT, BASE, RIGHT, BASE, "grid"), *marks, _text((LEFT + RIGHT) / 2, BASE + 54, x_label)]
    head = f'<svg class="chart" viewBox="0 0 960 {BASE + 62}" role="img" aria-label="{escape(label)}">'
    return "\n".join([head, *frame, "</svg>"])


def _band(x: Callable[[float], float], tops: Sequence[float | None], bottoms: Sequence[float | None]) -> list[str]:
    """The area between two lines, step by step, where both have a height."""
    edges = list(enumerate(zip(tops, bottoms, strict=False)))
    drawn = []
    for (i, (top, bottom)), (j, (next_top, next_bottom)) in pairwise(edges):
        if top is None or bottom is None or next_top is None or next_bottom is None:
            continue
        corners = ((x(i), top), (x(j), next_top), (x(j), next_bottom), (x(i), bottom))
        drawn.append(f'<polygon class="band" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>')
    return drawn


def _with_lines(
    label: str,
    marks: list[str],
    x_label: str,
    x: Callable[[float], float],
    lines: Iterable[tuple[str, Sequence[float | None], str]],
) -> str:
    """A chart with lines `(name, heights, number for the legend)` over 0, 1, 2, …; gaps where a height is `None`."""
    legend = []
    for number, (name, heights, end) in enumerate(lines):
        kind = "limit" if name == "limit" else f"c{number % COLOURS} d{number // COLOURS % DASHES}"
        spots = ("|" if height is None else f"{x(i):.1f},{height:.1f}" for i, height in enumerate(heights))
        runs = [run.split() for run in " ".join(spots).split("|")]
        # A point between breaks is a line to itself, which round caps make a dot.
        points = (" ".join(run if len(run) > 1 else run * 2) for run in runs if run)
        drawn = "".join(f'<polyline class="line {kind}" points="{those}"/>' for those in points)
        marks.append(f"<g>{element('title', f'{name}: {end}')}{drawn}</g>")
        key = f'<svg width="24" height="8" aria-hidden="true"><path class="line {kind}" d="M1 4H23"/></svg>'
        legend.append(f"<li>{key}{element('span', name)}{element('b', end)}</li>")
    return _chart(label, marks, x_label) + '\n<ul class="legend">' + "\n".join(legend) + "</ul>"


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _powers(low: float, high: float, max_ticks: int) -> range:
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    return range(
        first, last + 1, next(n for n in (1, 2, 5, 10, 20, 50, 100, last + 1) if last - first <= n * max_ticks)
    )


def _text(x: float, y: float, text: str, kind: str = "label", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'

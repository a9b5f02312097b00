"""The pages of `nopad search`, `nopad duplicates` and `nopad clusters`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from nopad import html
from nopad.counts import counted
from nopad.search.features import Features, Group
from nopad.search.query import Match
from nopad.search.thumbnails import thumbnail_of

MAX_GROUPS, MAX_ROWS = 200, 24


def matches_page(features: Features, query: str, matches: Sequence[Match]) -> str:
    """Images with their cosines, best first."""
    images = (_entry(features, match.row, f"{match.score:z.3f}") for match in matches)
    return html.page(query, [html.element("h1", query), _of(features), html.gallery(images)])


def groups_page(features: Features, title: str, kind: str, groups: Sequence[Group]) -> str:
    """A section for each group."""
    left_out = f", the first {MAX_GROUPS} shown" if len(groups) > MAX_GROUPS else ""
    parts = [html.element("h1", f"{title}{left_out}"), _of(features), *_sections(features, kind, groups)]
    return html.page(title, parts)


def _sections(features: Features, kind: str, groups: Sequence[Group]) -> Iterator[str]:
    for number, group in enumerate(islice(groups, MAX_GROUPS), 1):
        shown = f", {MAX_ROWS} shown" if len(group) > MAX_ROWS else ""
        images = (_entry(features, int(row)) for row in group.rows[:MAX_ROWS])
        yield html.section(f"{kind} {number}: {counted(len(group), 'image')}{shown}", html.gallery(images))


def _of(features: Features) -> str:
    return html.element(
        "p", f"{counted(len(features), 'image')} by {features.metadata.get('model', 'an unknown model')}"
    )


def _entry(features: Features, row: int, *notes: str) -> tuple[bytes, str, Sequence[str]]:
    """An item of `html.gallery`: a thumbnail, the name, and lines below it."""
    data, reason = thumbnail_of(features, row)
    height, width = features.sizes[row]
    return data, features.ids[row], [*notes, f"{width} × {height}", *([reason] if reason else [])]

import io
import re

import pytest

from nopad.embedding import progress
from nopad.embedding.progress import Display, Estimate, Progress, clock, describe, display, duration
from nopad.pipeline.stats import Stats


def state(
    images: int, *, rows: int = 40, kept: int = 0, seconds: float = 2.0, packs: int = 0, mean: float | None = None
) -> Progress:
    counts = {"patches": images * 100, "tokens": images * 100, "capacity": images * 125, "packs": packs}
    return Progress(rows, kept, Stats(images=images, failed=min(images, 1), **counts), seconds, mean)


def test_progress_in_words():
    assert describe(state(10)) == "5.0 images/s · 500 tokens/s · fill 80% · 1 failed · 0:00:06 left"
    assert describe(state(0, seconds=0)) == "0.0 images/s · 0 tokens/s · fill 0% · 0 failed · ? left"
    assert [clock(seconds) for seconds in (0.4, 59.6, 3725, 400000)] == ["0:00:00", "0:01:00", "1:02:05", "111:06:40"]


def test_lines_come_now_and_then_and_at_the_end(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with display(stream) as shown:
        for images in (0, 1, 2, 40, 40, 40):
            shown.report(state(images, kept=7))
            now += 6.0
    first, *lines = stream.getvalue().splitlines()
    assert first == "40 images"
    assert [line.split(" · ")[0] for line in lines] == [
        f"{images} of 40 images (and 7 from before)" for images in (0, 2, 40)
    ]


def test_a_log_that_cannot_be_written_ends_nothing():
    tried = []

    class Closed(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise BrokenPipeError

    Display(Closed()).report(state(1))
    assert tried


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with display(stream) as shown:
        shown.message("reading [b]a[/b]\x1b[2J")
        shown.report(state(10, kept=20))
        shown.report(state(40, kept=20))
    text = re.sub(r"\x1b\[[\d;?]*\w", "", stream.getvalue())
    assert "━━━" in text
    assert "reading [b]a[/b]\\x1b[2J" in text
    assert "60/60" in text
    assert "20.0 images/s · 2,000 tokens/s · fill 80% · 1 failed · 0:00:00 left" in text


def test_estimate_comes_once_after_a_few_packs():
    estimate = Estimate()
    lines = [
        list(estimate.lines(state(images, rows=200_000, seconds=seconds, packs=packs, mean=310.0)))
        for images, seconds, packs in ((0, 0, 0), (10, 8, 1), (20, 10, 2), (60, 18, 5), (70, 19, 6))
    ]
    # 5,000 patches in 10 s, and 62,000,000 in all
    estimated = "200,000 images, about 310 patches each: 34 h at 500 patches/s"
    assert lines == [["200,000 images, about 310 patches each"], [], [], [estimated], []]


def test_estimate_by_images_where_headers_do_not_say():
    estimate = Estimate()
    lines = [
        list(estimate.lines(state(images, rows=5000, seconds=seconds, packs=packs)))
        for images, seconds, packs in ((0, 0, 0), (10, 8, 1), (20, 10, 2), (60, 18, 5))
    ]
    assert lines == [["5,000 images"], [], [], ["5,000 images: 17 min at 5.0 images/s"]]


def test_short_run_is_not_estimated():
    estimate = Estimate()
    for images, packs in ((0, 0), (10, 1), (30, 9), (40, 12)):
        lines = list(estimate.lines(state(images, packs=packs, seconds=images)))
        assert lines == (["40 images"] if images == 0 else [])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (50400, "14 h"), (2e6, "23 days")],
)
def test_duration_in_words(seconds, words):
    assert duration(seconds) == words

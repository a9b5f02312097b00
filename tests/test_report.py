"""The HTML page of an alignment: what it says, and that it is one well-formed, self-contained, escaped file."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from nopad.align.page import align_page, write_align_page
from nopad.align.report import AlignReport, CaseResult, WorstImage
from nopad.html import line_chart, near_one, scientific

VOID = {"meta", "br", "link", "img", "hr", "input"}
EDGES = [10 ** (power / 2) for power in range(-24, 1)]
FP32 = CaseResult(
    name="16 × 16 patches, batched",
    images=2,
    tokens=512,
    min_cosine=1 - 3.2e-8,
    mean_cosine=1 - 1e-9,
    max_abs=3e-5,
    mean_abs=2e-7,
    max_relative=4.1e-6,
    mean_relative=6e-7,
    min_pooled_cosine=None,
    max_pooled_relative=None,
    distance=None,
    reference_distance=None,
    pooled_distance=None,
    reference_pooled_distance=None,
    drift=(0.0, 1e-7, 3e-7, 6e-7),
    layer_cosines=(1.0, 1 - 1e-9, 1 + 1e-15, 1 - 4e-9),
    histogram=tuple(zip(EDGES, EDGES[1:], [0] * 2 + [500, 12] + [0] * 20, strict=False)),
    passed=True,
    failures=(),
)
REPORT = AlignReport(
    checkpoint="apple/aimv2-large-patch14-native",
    family="aimv2",
    reference="transformers Aimv2VisionModel",
    weights="read from the checkpoint as it is (apple names)",
    device="cpu",
    dtype="float32",
    precision=None,
    attention="sdpa",
    execution="eager",
    capacity=None,
    threshold=0.99,
    versions={"nopad": "0.1.0", "torch": "2.10.0"},
    cases=(FP32, replace(FP32, name="all sizes in one pack")),
    skipped=(),
)
BF16_FAILS = replace(
    FP32,
    name="a clip of 3 frames",
    min_cosine=0.974321,
    min_pooled_cosine=0.999123,
    max_pooled_relative=4.4e-2,
    distance=3.1e-2,
    reference_distance=1.2e-2,
    pooled_distance=2.1e-2,
    reference_pooled_distance=0.9e-2,
    histogram=tuple(zip(EDGES, EDGES[1:], [0] * 19 + [30, 8, 0, 0, 0], strict=False)),
    passed=False,
    failures=("minimum cosine 0.974321, expected more than 0.99", "distance to float32 3.100e-02"),
)


class Page(HTMLParser):
    """Tags that nest, their attributes, and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.open, self.tags, self.texts = html, [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append((self.open[-1], data))

    def texts_in(self, tag):
        return [text for of, text in self.texts if of == tag]

    @property
    def charts(self):
        svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.html, flags=re.DOTALL)]
        return [svg for svg in svgs if svg.get("class") == "chart"]


def svg(html):
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, flags=re.DOTALL)[0])


def test_page_of_a_float32_pass_shows_each_case():
    page = Page(align_page(REPORT))
    assert page.texts_in("h1") == ["Passed: the packed features equal the reference's"]
    assert page.texts_in("th")[-2:] == ["16 × 16 patches, batched", "all sizes in one pack"]
    cells = page.texts_in("td")
    assert cells[:9] == ["Passed", "2", "512", "1 − 3.2e-08", "1 − 1.0e-09", "4.1e-06", "6.0e-07", "3.0e-05", "2.0e-07"]
    assert len(cells) == 2 * 9  # neither pooled columns nor distances
    assert "relative difference of a token or a pooled vector at most 1e-04" in page.texts_in("dd")
    assert "nopad 0.1.0 · torch 2.10.0" in page.texts_in("dd")


def test_page_of_a_bfloat16_failure_has_the_limits_that_were_missed():
    passing = replace(FP32, name="mixed", distance=1.2e-2, reference_distance=1.2e-2)
    page = Page(align_page(replace(REPORT, dtype="bfloat16", cases=(passing, BF16_FAILS))))
    assert page.texts_in("h1") == ["Failed: 1 of 2 cases"]
    assert [text for text in page.texts_in("li") if text in BF16_FAILS.failures] == list(BF16_FAILS.failures)
    cells = page.texts_in("td")
    # No pooling in the first case.
    assert cells[9:15] == ["–", "–", "1.20e-02", "1.20e-02", "–", "–"]
    assert cells[24:30] == ["0.999123", "4.4e-02", "3.10e-02", "1.20e-02", "2.10e-02", "9.00e-03"]
    (limit,) = (text for text in page.texts_in("dd") if text.startswith("distance"))
    assert limit.startswith("distance to the float32 reference at most 1.1 × the reference's own; of pooled vectors ")
    assert limit.endswith(" at most 2 × the larger of the reference's own and its tokens'")


def test_page_in_fp8_has_the_threshold_as_only_limit():
    case = replace(FP32, min_cosine=0.975, layer_cosines=(1.0, 0.99, 0.98, 0.975))
    report = replace(REPORT, precision="fp8", threshold=0.95, execution="compiled", capacity=4096, cases=(case,))
    page = Page(align_page(report))
    assert page.texts_in("h1") == ["Passed: every cosine to the reference's features is more than 0.95"]
    facts = dict(zip(page.texts_in("dt"), page.texts_in("dd"), strict=True))
    assert facts["Precision"] == "fp8"
    assert facts["Layers"] == "compiled, in packs of 4,096 tokens"
    assert facts["Limit"] == "none: in fp8 the threshold alone decides"
    assert page.texts_in("span") == ["largest of all cases"]  # and no limit


def test_page_without_cases_fails_and_has_the_reasons():
    page = Page(align_page(replace(REPORT, cases=(), skipped=("several sizes: 16 × 16 only",))))
    assert page.texts_in("h1") == ["Failed: no case was compared"]
    assert page.texts_in("li") == ["several sizes: 16 × 16 only"]
    assert page.charts == []


def test_page_with_nan_and_infinity_is_well_formed():
    nan = math.nan
    broken = replace(BF16_FAILS, min_cosine=nan, max_relative=math.inf, drift=(0.0, nan, 1e-3, nan, nan))
    broken = replace(broken, layer_cosines=(1.0, nan))
    page = Page(align_page(replace(REPORT, cases=(broken, replace(FP32, drift=(nan, nan))))))
    assert {"NaN", "inf"} <= set(page.texts_in("td"))
    assert page.texts_in("span") == ["largest of all cases", BF16_FAILS.name, "limit"]
    assert page.texts_in("b") == ["NaN", "NaN", "1.0e-04"]
    for _, attributes in page.tags:
        assert not {"nan", "inf"} & set(re.split(r"[ ,]", attributes.get("points", "") + " " + attributes.get("y", "")))


def test_page_escapes_all_texts():
    evil = "<script>alert('1')</script> & \"$body"
    case = replace(BF16_FAILS, name=evil, failures=(evil,))
    words = dict.fromkeys(("checkpoint", "family", "reference", "weights", "device", "dtype", "attention"), evil)
    page = Page(align_page(replace(REPORT, **words, versions={evil: evil}, cases=(case,), skipped=(evil,))))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.texts_in("th")[-1] == evil
    assert page.texts_in("li") == [evil, evil]
    assert evil in page.texts_in("span")


def test_page_is_self_contained_and_can_be_navigated():
    page = Page(align_page(replace(REPORT, cases=(FP32, BF16_FAILS), skipped=("reason",))))
    assert not re.search(r"https?://|url\(|@import", page.html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    assert page.texts_in("h2") == [
        "Drift per layer",
        "Cases",
        "What was compared",
        "Skipped",
    ]
    assert page.texts_in("caption") == [
        "Each case. Relative: the norm of a token's difference over the norm of the reference's token."
    ]
    assert [(chart.get("role"), chart.get("aria-label")) for chart in page.charts] == [
        ("img", "Largest relative difference by layer"),
    ]


def test_page_shows_where_on_the_worst_image_tokens_differ():
    difference = torch.tensor([[1e-7, 2e-7, 1e-7], [1e-7, 9e-6, math.inf]])
    worst = WorstImage("photos", difference, np.zeros((8, 12, 3), np.uint8))
    page = Page(align_page(replace(REPORT, worst=worst)))
    assert page.texts_in("h2")[0] == "Where a token differs most"
    (lead,) = (text for text in page.texts_in("p") if text.startswith("photos"))
    assert lead.startswith("photos: the token in row 2, column 3 differs most, by inf of the norm of the reference's; ")
    assert lead.endswith("the limit is 1e-04.")
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "worst" not in replace(REPORT, worst=worst).to_dict()


def test_drift_is_a_line_of_the_largest_case_and_a_band_down_to_the_smallest():
    cases = (replace(FP32, drift=(0.0, 2e-7, 1e-6)), replace(FP32, drift=(1e-8, 1e-7, 3e-6)))
    page = Page(align_page(replace(REPORT, cases=cases)))
    titles = [group.findtext("title") for group in page.charts[0].iter("g")]
    assert titles == ["largest of all cases: 3.0e-06", "limit: 1.0e-04"]
    first, _ = page.charts[0].iter("polygon")  # from 1e-8, 2e-7 at layer 0 … to 1e-7, 2e-7
    corners = [tuple(map(float, corner.split(","))) for corner in first.get("points").split()]
    assert [corner[0] for corner in corners] == [84, 512, 512, 84]
    assert corners[0][1] < corners[3][1] == 232  # 0, on the floor
    (line,) = (line for line in page.charts[0].iter("polyline") if "limit" in line.get("class"))
    assert len({point.split(",")[1] for point in line.get("points").split()}) == 1


def test_line_lies_on_the_floor_at_zero_and_breaks_at_nan():
    chart = svg(line_chart("drift", [("a", (0.0, 1e-4, math.nan, 1e-2, math.inf, 1e-3, 1e-3))], "layer"))
    lines = [line.get("points").split() for line in chart.iter("polyline")]
    # Ticks 0, 1e-4, 1e-3, 1e-2 over 210 units; the point alone between two breaks is drawn as a dot.
    assert [[float(point.split(",")[1]) for point in line] for line in lines] == [[232, 162], [22, 22], [92, 92]]
    assert [text.text for text in chart.iter("text") if text.get("text-anchor") == "end"] == [
        "0",
        "1e-4",
        "1e-3",
        "1e-2",
    ]


@pytest.mark.parametrize("values", [(), (0.0,), (0.0, 0.0), (math.nan,), (1.0,), (1e-4, 1e-4)])
def test_line_chart_of_hardly_any_values_is_drawn(values):
    assert svg(line_chart("drift", [("a", values)], "layer")).get("aria-label") == "drift"


def test_numbers_have_the_digits_that_matter():
    assert [near_one(x) for x in (0.98765432, 1.0, 1 - 2.5e-7, 1 + 2e-7, -0.25, math.nan, None)] == [
        "0.987654", "1", "1 − 2.5e-07", "1 + 2.0e-07", "-0.250000", "NaN", "–",
    ]  # fmt: skip
    assert [scientific(x) for x in (0.0, 3.21e-8, math.nan, math.inf, None)] == ["0", "3.2e-08", "NaN", "inf", "–"]


def test_page_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_align_page(replace(REPORT, checkpoint="/data/\udce9"), path)  # a directory name in Latin-1
    assert r"/data/\udce9" in path.read_text(encoding="utf-8")
    write_align_page(REPORT, path)
    assert path.read_text(encoding="utf-8") == align_page(REPORT)
    assert list(path.parent.iterdir()) == [path]


def test_pipe_is_written_to_and_stays(tmp_path):
    pipe, link, page = tmp_path / "pipe", tmp_path / "link", tmp_path / "page"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    write_align_page(REPORT, pipe)
    assert reader.communicate(timeout=60)[0] == align_page(REPORT)
    assert pipe.is_fifo()
    link.symlink_to(page)
    write_align_page(REPORT, link)
    assert link.is_symlink()
    assert page.read_text() == align_page(REPORT)


def test_module_of_the_page_imports_neither_torch_nor_transformers():
    code = "import sys, nopad.html, nopad.align.page; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The pages in Chromium: no error, nothing cut, light and dark, and what pointer and keys do.

`make pages` runs them, and keeps the screenshots in `demo/screenshots`.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import write_photos
from tiny_encoders import tiny

import nopad
from nopad.bench import timing
from nopad.cli import main

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium") or shutil.which("google-chrome")
LOOKS = [(360, "light"), (768, "dark"), (1440, "light"), (1440, "dark")]
PAGES = ["pictures", "collection", "labelled", "results", "duplicates", "clusters", "align", "bench"]
CUT = """() => [...document.querySelectorAll("body *")].filter((each) => {
  const box = each.getBoundingClientRect(), scrolls = each.scrollWidth > each.clientWidth + 1;
  const hides = getComputedStyle(each).overflowX !== "visible";
  return (box.width && (box.left < -1 || box.right > innerWidth + 1)) || (scrolls && hides && each.tagName !== "INPUT");
}).map((each) => `${each.tagName} ${each.className}: ${each.textContent.slice(0, 40)}`)"""
DRAWN = "each => { draw(); return each.toDataURL(); }"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which the continuous integration does not have")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which make pages installs")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(browser, photos, table, labelled, model, tmp_path_factory):
    """A folder with one page of each kind."""
    folder = tmp_path_factory.mktemp("pages")
    models = f"{tiny('dinov3', folder / 'dinov3')},{tiny('siglip', folder / 'siglip')}"
    pictures = [str(photos / name) for name in ("000.png", "003.png")]
    whole = write_photos(folder / "whole", 3, scale=4)
    commands = {
        "pictures": ["view", *pictures, "--model", models, "--layers", "0,-1", "--size", "native", "--out"],
        "collection": ["view", table, "--threshold", "0.9999", "--out"],
        "labelled": ["view", labelled, "--out"],
        "results": ["search", table, photos / "001.png", "--html"],
        "duplicates": ["duplicates", table, "--html"],
        "clusters": ["clusters", table, "-k", "3", "--html"],
        "align": ["align", model, "--images", whole, "--report"],
        "bench": ["bench", model, "--workload", "small", "--images", "2", "--runs", "2", "--capacity", "256,512"],
    }
    commands["bench"] += ["--report"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.PEAK_GEMMS, "cpu", (64, 2))
        for name, command in commands.items():
            assert main([*map(str, command), str(folder / f"{name}.html")]) == 0, name
    return folder


@pytest.fixture
def opened(browser, pages):
    """Opens a page by name, width and colour scheme; nothing that it does may be an error or need a network."""
    errors, contexts = [], []

    def open_page(name, width, scheme):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(error))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("request", lambda request: request.url[:5] in ("file:", "data:") or errors.append(request.url))
        page.goto((pages / f"{name}.html").as_uri())
        if name in ("pictures", "collection", "labelled"):
            page.wait_for_selector("body[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_in_light_and_dark(opened, tmp_path, name):
    folder = Path(os.environ.get("NOPAD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for width, scheme in LOOKS:
        page = opened(name, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == [], (width, scheme)
        red = int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
        assert (red < 128) == (scheme == "dark")
        page.screenshot(path=folder / f"{name}-{width}-{scheme}.png", full_page=True)


def test_images_by_pointer_and_keys(opened):
    for width, scheme in LOOKS[:1] + LOOKS[-1:]:
        page = opened("pictures", width, scheme)
        canvas, message = page.locator("canvas").first, page.locator("output").first
        before, words = canvas.evaluate("each => each.toDataURL()"), message.inner_text()
        canvas.focus()
        page.keyboard.press("ArrowRight")
        assert message.inner_text() != words
        page.locator("input[value=similarity]").check()
        assert canvas.evaluate("each => each.toDataURL()") != before
        assert "most similar to" in message.inner_text()
        words = message.inner_text()
        canvas.hover(position={"x": 3, "y": 3})
        assert message.inner_text() != words
        assert message.inner_text().startswith("row 1 of ")
        page.locator("#layer").fill("0")
        assert page.locator("#layer-name").inner_text() == "layer 0"


def test_a_collection_by_pointer_and_keys(opened, table):
    features = nopad.read_features(table)
    for width, scheme in LOOKS[:1] + LOOKS[-1:]:
        page = opened("collection", width, scheme)
        canvas, panel = page.locator("#map"), page.locator("#panel")
        # All images of the map lie on it.
        boxes = page.evaluate("(draw(), view.boxes)")
        size = page.evaluate("[canvas.width, canvas.height]")
        assert boxes
        assert all(min(box["x"], box["y"]) >= 0 for box in boxes)
        assert all(box["x"] + box["w"] <= size[0] and box["y"] + box["h"] <= size[1] for box in boxes)
        # By the keyboard.
        canvas.focus()
        page.keyboard.press("ArrowRight")
        chosen = page.evaluate("view.chosen")
        assert panel.locator("b").inner_text() == page.evaluate("data.ids[view.chosen]")
        near = [(each["place"], each["cosine"]) for each in page.evaluate("view.near")]
        cosines = features.normalized @ features.normalized[chosen]
        np.testing.assert_allclose([cosine for _, cosine in near], np.sort(np.delete(cosines, chosen))[::-1], atol=0.02)
        assert panel.locator("img").count() == 11
        before = canvas.evaluate(DRAWN)
        page.keyboard.press("+")
        assert canvas.evaluate(DRAWN) != before
        page.keyboard.press("0")
        assert canvas.evaluate(DRAWN) == before
        page.keyboard.press("Escape")
        assert panel.inner_text() == "Choose an image on the map."
        # By the pointer: an image of the map, then one that is similar.
        box = page.evaluate("(draw(), view.boxes[0])")
        canvas.click(position={"x": box["x"] + box["w"] / 2, "y": box["y"] + box["h"] / 2})
        assert page.evaluate("view.chosen") == box["place"]
        panel.locator("ol button").first.click()
        assert page.evaluate("view.chosen") != box["place"]
        twin = page.locator("#duplicates [data-place]").first
        twin.click()
        assert page.evaluate("view.chosen") == int(twin.get_attribute("data-place"))
        # By name.
        page.locator("#find").fill("SCRIPT")
        assert page.locator("#found").inner_text() == "1 found"
        page.keyboard.press("Enter")
        assert "<script>alert(1)" in panel.locator("b").inner_text()
        page.locator("[data-cluster]").first.click()
        assert page.locator("[data-cluster]").first.get_attribute("aria-pressed") == "true"
    page = opened("labelled", 1440, "light")
    page.evaluate("choose(0)")
    assert "a </script>" in page.locator("#panel").inner_text()

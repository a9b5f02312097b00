"""The page of `nopad view` of a large table in Chromium: its size, when it is ready, and frames while it is moved.

    PYTHONPATH=.venv/pages python benchmarks/collection_page.py --rows 100000

`make pages` installs Playwright there; Chromium has to be installed. The thumbnails are small pictures of noise.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] - not in .venv
from search import vectors, write_table

import nopad
from nopad import html
from nopad.view.collection import collect
from nopad.view.collection_page import collection_page

FRAMES = """async () => {
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let frame = 0; frame < 90; frame++) {
    ACT;
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return times;
}"""
ONCE = "() => { const start = performance.now(); ACT; draw(); return performance.now() - start; }"
ACTIONS = {
    "panned": "view.x += 0.002; redraw()",
    "zoomed": "zoom(frame < 45 ? 1.05 : 1 / 1.05)",
    "pointed at": "view.hovered = at(frame * 10, 300); redraw()",
}
ANSWERS = {
    "a picture and those most similar": "choose(1000)",
    "the next picture by an arrow key": "choose(towards(1, 0))",
    "names that contain a word": 'find.value = "0099"; search()',
}


def main() -> None:
    """Make the table and its page, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=768)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        write_table(Path(folder) / "features", vectors(options.rows, options.width))
        features = nopad.read_features(Path(folder) / "features")
        started = time.perf_counter()
        shown = collect(features, map="pca", thumbnails=0)
        picture = _picture()
        for row in range(0, options.rows, max(1, options.rows // 2000)):
            shown.thumbnails[row] = picture
        html.write(collection_page(shown), Path(folder) / "page.html")
        megabytes = (Path(folder) / "page.html").stat().st_size / 1e6
        print(f"{options.rows:,} rows: page made in {time.perf_counter() - started:.0f} s, {megabytes:.1f} MB")
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page: Any = browser.new_page(viewport={"width": 1440, "height": 900})
            started = time.perf_counter()
            page.goto((Path(folder) / "page.html").as_uri())
            page.wait_for_selector("body[data-ready=yes]")
            print(f"ready after {time.perf_counter() - started:.1f} s")
            for name, act in ACTIONS.items():
                times = page.evaluate(FRAMES.replace("ACT", act))[10:]
                low, high = statistics.median(times), statistics.quantiles(times, n=20)[-1]
                print(f"{name:34} frames of {low:5.1f} ms, 95 % within {high:5.1f} ms")
            for name, act in ANSWERS.items():
                print(f"{name:34} {page.evaluate(ONCE.replace('ACT', act)):5.1f} ms")
            browser.close()


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)).save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

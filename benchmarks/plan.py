"""Seconds that `nopad plan` expects of a job, and those that the job takes, each from the shell's start to its end.

python benchmarks/plan.py --images 300 --model tests/goldens/aimv2-apple-native
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHORTEST, LONGEST = 100, 1600
"""Sides in pixels, log-uniform."""


def write_photos(folder: Path, number: int) -> None:
    """JPEGs of smooth colours with some noise, of about 1.5 bits a pixel."""
    random = np.random.default_rng(0)
    for index in range(number):
        height, width = np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST), 2)).astype(int)
        colours = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height))
        pixels = np.asarray(colours, np.int16) + random.integers(-8, 9, (height, width, 1), dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06}.jpg", quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--model", required=True, help="as nopad embed takes it")
    parser.add_argument("--runs", type=int, default=1, help="of both, one after the other (default: %(default)s)")
    arguments, options = parser.parse_known_args()  # the others are of both commands
    with tempfile.TemporaryDirectory() as name:
        photos = Path(name) / "photos"
        photos.mkdir()
        write_photos(photos, arguments.images)
        command = [sys.executable, "-m", "nopad"]
        job = [str(photos), "--model", arguments.model, *options, "--json"]
        for number in range(arguments.runs):
            output = subprocess.run([*command, "plan", *job], capture_output=True, check=True).stdout
            planned = json.loads(output)["total_seconds"]
            start = time.perf_counter()
            out = ["--out", str(Path(name) / f"table-{number}")]
            subprocess.run([*command, "embed", *job, *out], capture_output=True, check=True)
            seconds = time.perf_counter() - start
            print(f"plan {planned:.1f} s, job {seconds:.1f} s: {planned / seconds - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()

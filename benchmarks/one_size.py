"""Images of one size: nopad's packs beside the batch of timm's model, compiled and not, in one run.

    python benchmarks/one_size.py

AIMv2-L on images of 224 pixels, random weights and pixels in bfloat16 (float32 on a CPU), medians of interleaved runs.
Needs timm, which `nopad bench` does without. Without the extra `hopper` it shows what plain torch and Triton do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import timm  # pyright: ignore[reportMissingImports]
import torch

import nopad
from nopad.bench.timing import PEAK_GEMMS, gemms, timer
from nopad.encoder import PackedEncoder
from nopad.terminal import columns

MODEL, TIMM_MODEL = "apple/aimv2-large-patch14-native", "aimv2_large_patch14_224"
SIDE, GRID = 224, (1, 16, 16)
CAPACITIES = {"cuda": (16896, 32768), "cpu": (2048,)}


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=CAPACITIES, help="default: cuda")
    parser.add_argument("--images", type=int, default=256, help="default: 256")
    parser.add_argument("--batch", type=int, default=256, help="images of a batch of timm's (default: 256)")
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each (default: 9)")
    options = parser.parse_args()
    device, dtype = torch.device(options.device), torch.bfloat16 if options.device == "cuda" else torch.float32
    encoder = nopad.load(f"untrained:{MODEL}", device=device, dtype=dtype)
    each = (packed(encoder, capacity, options.images) for capacity in CAPACITIES[options.device])
    runs: dict[str, Callable[[], object]] = dict(each)
    batch = min(options.batch, options.images)
    pixels = torch.randn(options.images, 3, SIDE, SIDE, device=device, dtype=dtype)
    theirs = timm.create_model(TIMM_MODEL).to(device, dtype).eval().forward_features
    for how, run in {"compiled": torch.compile(theirs), "not compiled": theirs}.items():
        runs[f"timm, {how}, batches of {batch}"] = lambda run=run: [run(part) for part in pixels.split(batch)]
    side, count = PEAK_GEMMS[options.device]
    runs[f"{count} GEMMs of {side}³"] = gemms(side, count, device, dtype)
    clock = timer(device)
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for _ in range(options.runs):
        for name, run in runs.items():
            seconds[name].append(clock(run).seconds * 1e3)
    print(f"{MODEL}, {options.images} images of {SIDE} pixels, {dtype}, attention {encoder.attention_backend}")
    rows = [(name, f"{statistics.median(ms):.1f}", f"{min(ms):.1f} … {max(ms):.1f}") for name, ms in seconds.items()]
    print("\n".join(columns([("", "ms", "min … max"), *rows])))


def packed(encoder: PackedEncoder, capacity: int, images: int) -> tuple[str, Callable[[], object]]:
    """A twin of the encoder compiled for packs of this capacity, and what runs it on all images."""
    twin = copy.deepcopy(encoder, {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())})
    patches = GRID[1] * GRID[2]
    in_pack = capacity // patches
    twin.compile(capacity, in_pack)
    numbers = [min(in_pack, images - start) for start in range(0, images, in_pack)]
    options = {"device": encoder.device, "dtype": encoder.dtype}
    packs = [
        (torch.randn(number * patches, encoder.patch_dim, **options), torch.tensor([GRID] * number))
        for number in numbers
    ]
    return f"nopad, {twin.execution}, packs of {capacity:,}", lambda: [twin(*pack) for pack in packs]


if __name__ == "__main__":
    main()

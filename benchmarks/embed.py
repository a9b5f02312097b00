"""`make bench-embed`: the whole embedding job beside a loop over transformers' processor and model, in one run.

Both read the same JPEGs with the same weights, block after block, each block by both, the order changing from block to
block, so that the machine's drift hits both alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from embed_gpu import CASES, run
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging as transformers_logging

import nopad
from nopad.atomic import atomic_write
from nopad.bench.baselines import Baseline
from nopad.embedding.api import embed
from nopad.encoder import PackedEncoder
from nopad.environment import dtype_name
from nopad.preprocessing.rules import Preprocessing
from nopad.terminal import columns, json_text

PHOTOS = Path(__file__).parent.parent / "examples/images"
MODEL = "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"
SHORTEST, LONGEST = 640, 4000
"""Long sides in pixels, log-uniform: from pictures of the web to those of a phone, 3.2 megapixels on average."""


def main() -> None:
    """Make the pictures, run both jobs, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    gpu = "cuda: the table of benchmarks/embed_gpu.py, with the options marked *"
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=gpu)
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help="* of all (default: %(default)s)")
    decoders = ("auto", "cpu", "gpu", "scaled")
    parser.add_argument("--decode", choices=decoders, default="auto", help="as nopad embed takes it")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="* of nopad embed (default: 3)")
    parser.add_argument("--no-peers", action="store_true", help="* leave out the job one writes today")
    parser.add_argument("--start", action="store_true", help="* when the command prints what, and its first row comes")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="* (default: 2000)")
    parser.add_argument("--blocks", type=int, default=10, metavar="N", help="each is run by both (default: 10)")
    parser.add_argument("--model", default=MODEL, help=f"as nopad embed takes it (default: {MODEL})")
    parser.add_argument("--capacity", type=int, metavar="N", help="tokens per pack (default: nopad's own)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per core)")
    parser.add_argument("--resize", choices=("torch", "pil"), default="torch", help="of nopad (default: torch)")
    parser.add_argument("--folder", default="demo/bench-embed", help="* keeps the pictures (default: demo/bench-embed)")
    parser.add_argument("--json", action="store_true", help="* print the numbers as JSON")
    options = parser.parse_args()
    if not 1 <= options.blocks <= options.images:
        parser.error(f"--blocks: expected 1 … {options.images}, the number of images, got {options.blocks}")
    transformers_logging.disable_progress_bar()
    if options.device == "cuda":
        cases = options.cases.split(",")
        if unknown := {*cases} - {*CASES}:
            parser.error(f"--cases: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
        what: dict[str, Any] = {"images": options.images, "runs": options.runs, "folder": Path(options.folder)}
        run(cases, **what, decode=options.decode, peers=not options.no_peers, start=options.start, as_json=options.json)
        return
    paths = pictures(Path(options.folder) / "images", options.images)
    settings = {name: getattr(options, name) for name in ("capacity", "workers", "resize", "decode")}
    encoder = nopad.load(options.model)
    job = BaselineJob.of(encoder, options.model)
    arguments = {name: value for name, value in settings.items() if value is not None}
    blocks = [
        run_block(encoder, job, paths[number :: options.blocks], arguments, number, options.blocks)
        for number in range(options.blocks)
    ]
    report = summarise(blocks, encoder, job, paths)
    print(json_text(report) if options.json else table(report))


def report_progress(line: str) -> None:
    print(f"· {line}", file=sys.stderr, flush=True)


# The pictures


def pictures(folder: Path, number: int, seed: int = 0) -> list[Path]:
    """JPEGs of mixed size, the same on every machine with the same Pillow; made where they are not there yet."""
    paths = [folder / f"{index:05}.jpg" for index in range(number)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        report_progress(f"making {len(missing):,} JPEGs in {folder}, once")
        folder.mkdir(parents=True, exist_ok=True)
        photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.iterdir()) if path.suffix != ".md"]
        grain = np.random.default_rng(seed).standard_normal((2 * LONGEST, 2 * LONGEST), np.float32)
        grain = (5 * grain).astype(np.int8)

        def make(index: int) -> None:
            image = picture(photos, grain, random.Random(f"{seed} {index}"))
            with atomic_write(paths[index]) as file:
                image.save(file, "JPEG", quality=90, subsampling="4:2:0")

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done, _ in enumerate(pool.map(make, missing), 1):
                if done % 500 == 0:
                    report_progress(f"{done:,} of {len(missing):,} made")
    return paths


def picture(photos: Sequence[Image.Image], grain: np.ndarray, draw: random.Random) -> Image.Image:
    """A part of one photo, enlarged, under a share of another one for detail and the grain of a sensor."""
    long = math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST)))
    short = long * draw.uniform(0.5, 1)
    width, height = map(round, (long, short) if draw.random() < 0.7 else (short, long))
    layers = []
    for share in (draw.uniform(0.4, 1), 1.0):
        photo = draw.choice(photos)
        wide, high = photo.width * share, photo.height * share
        left, top = draw.uniform(0, photo.width - wide), draw.uniform(0, photo.height - high)
        box = (left, top, left + wide, top + high)
        layers.append(photo.resize((width, height), Image.Resampling.BILINEAR, box=box))
    pixels = np.asarray(Image.blend(layers[0], layers[1], draw.uniform(0.1, 0.4))).astype(np.int16)
    row, column = draw.randrange(LONGEST), draw.randrange(LONGEST)
    pixels += grain[row : row + height, column : column + width, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# The two jobs


@dataclasses.dataclass(frozen=True)
class BaselineJob:
    """transformers' processor and model, one image at a time."""

    baseline: Baseline
    processor: Any
    description: str

    @classmethod
    def of(cls, encoder: PackedEncoder, model: str) -> BaselineJob:
        """With the weights of `encoder`.

        Raises:
            ValueError: there is no reference, or no PIL processor of this model's rule gives pixels.
        """
        baseline = Baseline.of(encoder, model, revision=None, trust_remote_code=False)
        if baseline.reference is None:
            raise ValueError(baseline.description)
        if encoder.projection_dim is not None:
            raise ValueError(
                f"--model {model}: expected one without projection, since its reference has no image_embeds"
            )
        processor, description = processor_of(encoder.preprocessing)
        return cls(baseline, processor, f"{baseline.description}; {description}")

    @torch.inference_mode()
    def run(self, paths: Sequence[Path], out: Path) -> np.ndarray:
        """Features `(N, D)`, which end up in one file."""
        features = []
        for path in paths:
            image = Image.open(path).convert("RGB")
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
            assert self.baseline.reference is not None
            tokens, pooled = self.baseline.reference.run(self.baseline.model, pixels)
            features.append((tokens.mean(0) if pooled is None else pooled).float().numpy())
        table = np.stack(features)
        np.save(out / "features.npy", table)
        return table


def processor_of(rule: Preprocessing) -> tuple[Any, str]:
    """A processor of transformers by a model's own rule, and its description.

    Raises:
        ValueError: a rule for which there is none.
    """
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[rule.resample]
    options: dict[str, Any] = {"resample": resample, "image_mean": list(rule.mean), "image_std": list(rule.std)}
    options["rescale_factor"] = rule.rescale_factor
    if rule.rule == "square":
        options["size"] = {"height": rule.size, "width": rule.size}
        processor = ViTImageProcessorPil(**options)
        description = type(processor).__name__
        if rule.rescale_before_resize:
            description += " with DINOv3's size, filter and statistics, since DINOv3ViTImageProcessor needs torchvision"
        return processor, description
    if rule.rule == "naflex":
        raise ValueError("--model: expected a rule that gives pixels, got 'naflex', whose processor gives patches")
    fixed = rule.rule == "crop"
    size: dict[str, Any] = {"size": {"shortest_edge": rule.size}, "crop_size": rule.size} if fixed else {}
    processor = CLIPImageProcessorPil(do_resize=fixed, do_center_crop=fixed, **size, **options)
    return processor, type(processor).__name__


@dataclasses.dataclass(frozen=True)
class Block:
    """Measurements on some of the images: seconds of both, nopad's summary, cosines."""

    images: int
    nopad: float
    baseline: float
    summary: dict[str, Any]
    cosines: np.ndarray


def run_block(
    encoder: PackedEncoder, job: BaselineJob, paths: Sequence[Path], settings: dict[str, Any], number: int, blocks: int
) -> Block:
    """Both jobs over some of the pictures, each from the files to a file of features."""
    for path in paths:  # neither is to find the files in the page cache and the other not
        path.read_bytes()
    with TemporaryDirectory() as out:
        listing = Path(out) / "block.txt"
        listing.write_text("".join(f"{path.absolute()}\n" for path in paths))
        seconds: dict[str, float] = {}
        results: dict[str, Any] = {}
        for name in ("nopad", "baseline") if number % 2 == 0 else ("baseline", "nopad"):
            start = time.perf_counter()
            if name == "nopad":
                results[name] = embed(listing, Path(out) / "table", model=encoder, **settings)
            else:
                results[name] = job.run(paths, Path(out))
            seconds[name] = time.perf_counter() - start
        ours = nopad.read_features(Path(out) / "table").embeddings
    cosines = torch.cosine_similarity(torch.from_numpy(ours), torch.from_numpy(results["baseline"]), dim=1).numpy()
    ratio = seconds["baseline"] / seconds["nopad"]
    rates = ", ".join(f"{name} {len(paths) / seconds[name]:.1f}" for name in ("nopad", "baseline"))
    report_progress(
        f"block {number + 1} of {blocks}: {rates} images/s, ratio {ratio:.2f}, min cosine {cosines.min():.5f}"
    )
    return Block(len(paths), seconds["nopad"], seconds["baseline"], results["nopad"].to_dict(), cosines)


# The numbers


def summarise(blocks: Sequence[Block], encoder: PackedEncoder, job: BaselineJob, paths: Sequence[Path]) -> dict:
    """The numbers of the table."""
    ratios = [block.baseline / block.nopad for block in blocks]
    images = sum(block.images for block in blocks)
    wall = sum(block.nopad for block in blocks)
    stages: dict[str, float] = {
        name: sum(block.summary["stats"][f"{name}_seconds"] for block in blocks)
        for name in ("decode", "encode", "wait")
    }
    stages["write"] = sum(block.summary["write_seconds"] for block in blocks)
    stages["other"] = wall - stages["encode"] - stages["wait"] - stages["write"]
    filled, capacity = (sum(block.summary["stats"][name] for block in blocks) for name in ("tokens", "capacity"))
    return {
        "model": encoder.source,
        "reference": job.description,
        "dtype": dtype_name(encoder.dtype),
        "cores": len(os.sched_getaffinity(0)),
        "images": images,
        "megabytes": sum(path.stat().st_size for path in paths) / 1e6,
        "images_per_second": {"nopad": images / wall, "baseline": images / sum(block.baseline for block in blocks)},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "stages": {name: {"seconds": seconds, "share": seconds / wall} for name, seconds in stages.items()},
        "fill": filled / capacity,
        "cosine": {
            "min": float(min(block.cosines.min() for block in blocks)),
            "median": float(np.median(np.concatenate([block.cosines for block in blocks]))),
        },
    }


def table(report: dict[str, Any]) -> str:
    """The numbers for a terminal."""
    ratio, cosine, rates = report["ratio"], report["cosine"], report["images_per_second"]
    names = {
        "decode": "decode, resize (seconds of all threads; beside the encoder)",
        "encode": "encode",
        "wait": "encoder waits for pictures",
        "write": "write shards",
        "other": "list inputs, hash weights, the rest",
    }
    stages = [("stage of nopad", "s", "of its time")]
    for name, stage in report["stages"].items():
        stages.append((names[name], f"{stage['seconds']:.1f}", f"{stage['share']:.1%}"))
    return "\n".join(
        (
            f"{report['model']}, {report['dtype']}, {report['cores']} cores: {report['images']:,} JPEGs, long side "
            f"{SHORTEST} … {LONGEST}, {report['megabytes']:,.0f} MB",
            f"baseline: {report['reference']}; one image at a time",
            "",
            *columns(
                [
                    ("", "images/s"),
                    ("nopad embed", f"{rates['nopad']:.2f}"),
                    ("baseline", f"{rates['baseline']:.2f}"),
                ]
            ),
            f"ratio {ratio['median']:.2f}, the median of blocks that both ran ({ratio['min']:.2f} … "
            f"{ratio['max']:.2f})",
            "",
            *columns(stages),
            f"packs {report['fill']:.1%} full",
            "",
            f"cosine of the features of both: median {cosine['median']:.6f}, min {cosine['min']:.6f}",
        )
    )


if __name__ == "__main__":
    main()

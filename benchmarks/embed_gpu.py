"""The embedding job on a GPU: `nopad embed` beside its encoder alone, decoding alone, and the job one writes today.

Run by `benchmarks/embed.py --device cuda`. All read the same JPEGs, crops of the example photos. The job one writes
today is transformers' model, compiled, in bfloat16, over batches of images of one size from a `DataLoader`.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import nopad
from nopad.atomic import atomic_write
from nopad.bench.baselines import Baseline
from nopad.embedding.api import embed
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.sources import list_inputs
from nopad.embedding.run import Summary
from nopad.embedding.settings import Settings
from nopad.embedding.workers import load_encoder, make_worker
from nopad.environment import device_name, versions
from nopad.pipeline.packer import best_fit
from nopad.pipeline.worker import Worker
from nopad.terminal import columns, json_text

SHORTEST, LONGEST = 900, 2250
"""Long sides in pixels, log-uniform: 1.74 megapixels on average."""
QUALITY = 88
BATCH = 64
"""Images that the job of today takes at a time."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is run.

    Attributes:
        side: pixels of the square images of the job of today, which have as many patches as `max_patches` are.
        options: of `nopad.embed`.
    """

    model: str
    side: int
    options: dict[str, Any]


CASES = {
    "aimv2": Case("apple/aimv2-large-patch14-native", 448, {"max_patches": 1024}),
    "aimv2-fp8": Case("apple/aimv2-large-patch14-native", 448, {"max_patches": 1024, "precision": "fp8"}),
    "siglip2": Case("google/siglip2-so400m-patch16-naflex", 256, {}),
    "dinov3-s": Case("facebook/dinov3-vits16-pretrain-lvd1689m", 224, {}),
    "dinov3-l": Case("facebook/dinov3-vitl16-pretrain-lvd1689m", 224, {}),
}


def run(
    names: Sequence[str],
    *,
    images: int,
    runs: int,
    folder: Path,
    decode: str,
    peers: bool,
    start: bool,
    as_json: bool,
) -> None:
    """Measure the cases of these names and print a table."""
    paths = photos(folder / "gpu-images", images)
    pixels = sum(math.prod(Image.open(path).size) for path in paths) / len(paths)
    report: dict[str, Any] = {
        "device": device_name("cuda"),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions("cuda"),
        "images": f"{len(paths):,} JPEGs, {pixels / 1e6:.2f} MP, {sum(p.stat().st_size for p in paths) / 1e9:.3f} GB",
    }
    rows = [measure(name, decode, paths, folder, runs, peers) for name in names]
    if start:
        report["start"] = started(names[0], decode, paths, folder)
    if as_json:
        print(json_text({**report, "cases": rows}))
        return
    print(f"{report['device']}, {report['cores']} cores, {report['images']}; {report['versions']}")
    header = ("", "nopad embed", "of the encoder", "encoder alone", "decode alone", "job of today", "limit")
    print("\n".join(columns([header, *map(_cells, rows)])))
    for line in report.get("start", ()):
        print(line)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def rate(name: str) -> str:
        return f"{row[name]:,.0f}" if isinstance(row.get(name), float) else str(row.get(name, "–"))

    return (
        row["case"],
        f"{rate('embed')} ({min(row['runs']):,.0f} … {max(row['runs']):,.0f})",
        f"{row['embed'] / row['encoder']:.2f}",
        rate("encoder"),
        rate("decode"),
        rate("today"),
        row["limit"],
    )


def measure(name: str, decode: str, paths: Sequence[Path], folder: Path, runs: int, peers: bool) -> dict[str, Any]:
    """Images per second of one case."""
    case = case_of(name, decode)
    model = checkpoint(case.model, folder)
    report_progress(f"{name}: nopad embed")
    summaries = [embedded(case, model, paths) for _ in range(runs)]
    rates = [summary.to_dict()["per_second"]["images"] for summary in summaries]
    row: dict[str, Any] = {"case": name, "embed": statistics.median(rates), "runs": rates}
    row["summary"] = summaries[rates.index(statistics.median_low(rates))].to_dict()
    row["limit"] = row["summary"].get("limit", "")
    report_progress(f"{name}: nopad embed {rates}; encoder and decoding alone")
    settings = Settings(model=str(model), device="cuda", **case.options)
    worker = make_worker(settings, load_encoder(settings), len(paths))
    grids, row["decode"] = decoded(worker, paths)
    row["encoder"] = encoder_alone(worker, grids)
    row["execution"], row["decoder"] = worker.encoder.execution, worker.decode
    report_progress(f"{name}: decode alone {row['decode']:,.0f}, encoder alone {row['encoder']:,.0f} images/s")
    del worker
    release()
    if peers and case.options.get("precision") is None:
        row["today"] = job_of_today(case, model, paths)
        report_progress(f"{name}: job of today {row['today']}")
        release()
    return row


def case_of(name: str, decode: str) -> Case:
    """A case with this decoder of JPEGs."""
    case = CASES[name]
    return dataclasses.replace(case, options={**case.options, "decode": decode})


def embedded(case: Case, model: Path, paths: Sequence[Path]) -> Summary:
    """One run of `nopad.embed` into a new folder."""
    with TemporaryDirectory() as out:
        summary = embed(listing(paths, Path(out)), Path(out) / "table", model=model, device="cuda", **case.options)
    assert summary.failed == 0, summary
    release()
    return summary


def decoded(worker: Worker, paths: Sequence[Path]) -> tuple[list[tuple[int, int, int]], float]:
    """The grids of all images, and how many a second are decoded without an encoder, and copied to the device."""
    with TemporaryDirectory() as out, Reader() as reader:
        inputs = list_inputs([str(listing(paths, Path(out)))]).inputs
        items = [inputs[index] for index in range(len(inputs))]

        def run_all() -> list[tuple[int, int, int]]:
            grids, upload = [], worker.runner().uploader
            with worker.read_ahead([items], reader.media, decoder=reader.decoder) as ahead:
                images = (image for group in ahead.groups() for image in group)
                while batch := list(itertools.islice(images, BATCH)):
                    grids += [image.grid for image in batch]  # pyright: ignore
                    upload(batch)()  # pyright: ignore
            torch.cuda.synchronize()
            return grids

        run_all()  # starts the processes
        seconds, grids = timed(run_all)
    return grids, len(paths) / seconds


@torch.inference_mode()
def encoder_alone(worker: Worker, grids: Sequence[tuple[int, int, int]]) -> float:
    """Images a second of the encoder on the packs of the job, its patches on the device already."""
    encoder = worker.encoder
    lengths = [math.prod(grid) + encoder.num_prefix_tokens for grid in grids]
    packs = []
    for start in range(0, len(grids), 2048):
        for pack in best_fit(lengths[start : start + 2048], worker.capacity):
            grid = torch.tensor([grids[start + index] for index in pack])
            rows = int(grid.prod(1).sum())
            options: dict[str, Any] = {"device": encoder.device, "dtype": encoder.dtype}
            packs.append((torch.randn(rows, encoder.patch_dim, **options), grid))

    def run_all() -> None:
        for patches, grid in packs:
            encoder.encode(patches, grid)
        torch.cuda.synchronize()

    run_all()
    return len(grids) / statistics.median(timed(run_all)[0] for _ in range(3))


def started(name: str, decode: str, paths: Sequence[Path], folder: Path) -> list[str]:
    """The lines of the command and when they came, and when the first row was there, in seconds."""
    case = case_of(name, decode)
    with TemporaryDirectory() as out:
        options = [f"--{key.replace('_', '-')}={value}" for key, value in case.options.items()]
        model = checkpoint(case.model, folder)
        command = [sys.executable, "-m", "nopad", "embed", str(listing(paths, Path(out))), "--out", f"{out}/table"]
        command += ["--model", str(model), "--json", "--shard-size", "256", *options]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        lines = []
        watch = ThreadPoolExecutor(1).submit(_first_shard, Path(out) / "table", start)
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            lines.append(f"{time.perf_counter() - start:6.2f} s  {line.rstrip()}")
        summary = json.loads(process.stdout.read())
        lines.append(f"{watch.result():6.2f} s  first shard; the run took {summary['seconds']:.2f} s")
    return lines


def _first_shard(folder: Path, start: float) -> float:
    while not next(iter(folder.glob("*.parquet")), None) and time.perf_counter() - start < 120:
        time.sleep(0.01)
    return time.perf_counter() - start


# The job one writes today


class Photos(Dataset):
    """Images of one size, as a processor of transformers makes them."""

    def __init__(self, paths: Sequence[Path], side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        self.paths = paths
        size: dict[str, Any] = {"height": side, "width": side}
        self.processor: Any = ViTImageProcessorPil(size=size, image_mean=list(mean), image_std=list(std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def job_of_today(case: Case, model: Path, paths: Sequence[Path]) -> float | str:
    """Images a second, after a first batch that compiles; or why there is no such job."""
    encoder = nopad.load(model, device="cuda", dtype=torch.bfloat16)
    baseline = Baseline.of(encoder, str(model), revision=None, trust_remote_code=False)
    if baseline.reference is None:
        return baseline.description
    rule, reference = encoder.preprocessing, baseline.reference
    del encoder

    @torch.compile
    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return reference.run_batch(baseline.model, pixels).mean(1)

    photos = Photos(paths[: len(paths) // BATCH * BATCH], case.side, rule.mean, rule.std)
    cores = len(os.sched_getaffinity(0))
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": cores, "pin_memory": True}

    def features() -> Iterator[torch.Tensor]:
        for pixels in DataLoader(photos, persistent_workers=False, **options):
            yield forward(pixels.to("cuda", torch.bfloat16, non_blocking=True)).float().cpu()

    try:
        with torch.inference_mode():
            forward(torch.randn(BATCH, 3, case.side, case.side, device="cuda", dtype=torch.bfloat16))
            seconds, _ = timed(lambda: list(features()))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]
    return len(photos) / seconds


# What all of them need


def checkpoint(name: str, folder: Path) -> Path:
    """A folder with random weights of a published architecture; made where it is not there yet."""
    path = folder / "models" / name.replace("/", "--")
    if not (path / "config.json").exists():
        report_progress(f"making {path}")
        nopad.load(f"untrained:{name}", dtype=torch.bfloat16).save_pretrained(path)
    return path


def photos(folder: Path, number: int) -> list[Path]:
    """JPEGs of mixed size; made where they are not there yet."""
    paths = [folder / f"{index:05}.jpg" for index in range(number)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        report_progress(f"making {len(missing):,} JPEGs in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        examples = Path(__file__).parent.parent / "examples/images"
        sources = [Image.open(path).convert("RGB") for path in sorted(examples.iterdir()) if path.suffix != ".md"]

        def make(path: Path) -> None:
            with atomic_write(path) as file:
                crop(sources, random.Random(path.name)).save(file, "JPEG", quality=QUALITY)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(make, missing))
    return paths


def crop(sources: Sequence[Image.Image], draw: random.Random) -> Image.Image:
    """A part of a photo, enlarged."""
    long = math.exp(draw.uniform(math.log(SHORTEST), math.log(LONGEST)))
    short = long * draw.uniform(0.5, 1)
    width, height = map(round, (long, short) if draw.random() < 0.7 else (short, long))
    source, share = draw.choice(sources), draw.uniform(0.6, 1)
    wide, high = source.width * share, source.height * share
    left, top = draw.uniform(0, source.width - wide), draw.uniform(0, source.height - high)
    box = (left, top, left + wide, top + high)
    return source.resize((width, height), Image.Resampling.BILINEAR, box=box)


def listing(paths: Sequence[Path], folder: Path) -> Path:
    """A list file of the images."""
    path = folder / "images.txt"
    path.write_text("".join(f"{path.absolute()}\n" for path in paths))
    return path


def timed(job: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a job, and what it returned."""
    start = time.perf_counter()
    result = job()
    return time.perf_counter() - start, result


def release() -> None:
    """Give memory of the GPU back, and forget compiled graphs."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def report_progress(line: str) -> None:
    print(f"· {line}", file=sys.stderr, flush=True)

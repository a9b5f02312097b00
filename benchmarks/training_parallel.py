"""Two or more GPUs that train one encoder on the packs of `PackLoader`, by DDP and FSDP2, beside one GPU.

    torchrun --nproc-per-node 2 benchmarks/training_parallel.py apple/aimv2-large-patch14-native --capacity 37888

Random weights in bfloat16, JPEGs with the sizes of the workload "mixed" of `nopad bench`, decoded by the workers of the
loader; the loss is the mean square of the tokens, the optimizer AdamW. First the process of rank 0 trains alone, on the
packs of all ranks by turns, with one step of the optimizer for all: its losses are those that the ranks must have. It
does so a second time with the packs of a step in the opposite order; what that changes is rounding.

Seconds are those of the clock from the seventh step on, waiting for the loader included. FLOPs are three times the
forward's; padding does not count. The peak is that of plain GEMMs on all GPUs at once. Balance is the mean time of the
ranks' forwards over the longest, averaged over steps.
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import os
import statistics
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import nopad
from nopad.bench.runner import attention_lengths, block_parameters
from nopad.bench.timing import PEAK_GEMMS, flops, gemms, timer
from nopad.bench.workloads import mixed
from nopad.encoder import PackedEncoder

PHOTOS = Path(__file__).parent.parent / "examples" / "images"
WARM_UPS = 6
"""Steps that are not timed: the first compile, and pinned memory for the packs that wait is allocated in the others."""
WAYS = ("ddp", "fsdp")


class Result(NamedTuple):
    """Of one process.

    Attributes:
        losses: of each step, the mean of all packs.
        tokens: of its timed steps.
        flops: of their forwards.
        seconds: of all of them.
        waited: of these, for the loader.
        forwards: seconds of each forward.
        memory: most bytes allocated.
    """

    losses: list[float]
    tokens: int
    flops: int
    seconds: float
    waited: float
    forwards: list[float]
    memory: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a published name, see `nopad models`")
    parser.add_argument("--capacity", type=int, default=37888, help="tokens per pack (default: 37888)")
    parser.add_argument("--steps", type=int, default=18, help="of the optimizer (default: 18)")
    parser.add_argument("--workers", type=int, default=12, help="of each rank's loader (default: 12)")
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=1, help="of a group of FSDP2's parameters (default: 1)")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="compile the layers")
    parser.add_argument("--attention", default="auto", help="kernel (default: the best there is)")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    options = parser.parse_args()

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = Bench(options, device, rank, world_size)
    alone = [] if rank else [bench.alone(backwards=backwards) for backwards in (False, True)]
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))
    init_device_mesh(device.type, (world_size,))
    peak = bench.peak()
    if alone:
        print(f"{options.model}, {bench.dataset_size:,} images, packs of {options.capacity:,}", flush=True)
        bench.report("one process", [alone[0]], peak / world_size)
    for way in options.ways.split(","):
        results: list[Any] = [None] * world_size
        dist.all_gather_object(results, bench.together(way))
        if alone:
            bench.report(f"{world_size} processes, {way}", results, peak)
            print(f"  tokens/s {_rate(results) / _rate(alone[:1]):.3f} × those of one process", flush=True)
            _compare(results[0].losses, *(each.losses for each in alone))
    dist.destroy_process_group()


class Bench:
    """Trains in each way, always from the same weights and on the same images."""

    def __init__(self, options: Any, device: torch.device, rank: int, world_size: int) -> None:
        self.options, self.device, self.rank, self.world_size = options, device, rank, world_size
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.processor = nopad.processor(f"untrained:{options.model}", size="native", dtype=self.dtype)
        mean = sum(mixed(256, seed=0).lengths) / 256 + self.processor.num_prefix_tokens
        self.dataset_size = int((options.steps + 2) * world_size * options.capacity / mean)
        self.dataset = photos(self.dataset_size, self.processor.patch_size)

    def encoder(self) -> PackedEncoder:
        """With the weights that all begin with."""
        name, attention = f"untrained:{self.options.model}", self.options.attention
        return nopad.load(name, device=self.device, dtype=self.dtype, head=False, attention=attention).train()

    def loaders(self, ranks: list[int]) -> Generator[list[nopad.Pack]]:
        """The packs of these ranks, step by step."""
        options = {"capacity": self.options.capacity, "world_size": self.world_size, "shuffle": True}
        options |= {"pin_memory": self.device.type == "cuda", "num_workers": self.options.workers}
        loaders = [nopad.data.PackLoader(self.dataset, self.processor, rank=rank, **options) for rank in ranks]
        for batches in itertools.islice(zip(*loaders, strict=True), self.options.steps):
            yield [pack for pack, _ in batches]

    def alone(self, *, backwards: bool) -> Result:
        """One process with the packs of all ranks."""
        encoder = self.encoder()
        ranks = list(range(self.world_size))[:: -1 if backwards else 1]
        return self.train(encoder, encoder, ranks)

    def together(self, way: str) -> Result:
        """This rank's part."""
        encoder = self.encoder()
        if way == "ddp":
            devices = [self.device.index] if self.device.type == "cuda" else None
            model: Any = DistributedDataParallel(encoder, device_ids=devices, gradient_as_bucket_view=True)
        else:
            shard(encoder, self.options.blocks)
            model = encoder
        result = self.train(encoder, model, [self.rank])
        losses = torch.tensor(result.losses, device=self.device)
        dist.all_reduce(losses)
        return result._replace(losses=(losses / self.world_size).tolist())

    def train(self, encoder: Any, model: Any, ranks: list[int]) -> Result:
        """A few steps."""
        cuda = self.device.type == "cuda"
        if self.options.compiled:
            encoder.compile_for_training(self.options.capacity, self.options.capacity // 64)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-5, fused=cuda)
        parameters = block_parameters(encoder)
        losses: list[Tensor] = []
        timed, lengths, waited, start = [], [], 0.0, 0.0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        packs_of_steps = self.loaders(ranks)
        for step in range(self.options.steps):
            if step == WARM_UPS:
                self.synchronize()
                start, waited, timed, lengths = time.perf_counter(), 0.0, [], []
            before = time.perf_counter()
            packs = next(packs_of_steps)
            waited += time.perf_counter() - before
            loss = torch.zeros((), device=self.device)
            for pack in packs:
                pack = pack.to(self.device, non_blocking=True)
                lengths += [length + encoder.num_prefix_tokens for length in pack.lengths()]
                timed.append(self.clock())
                part = model(pack).float().square().mean() / len(packs)
                timed[-1] = (timed[-1], self.clock())
                part.backward()
                loss = loss + part.detach()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        self.synchronize()
        seconds = time.perf_counter() - start
        total = flops(parameters, encoder.hidden_size, attention_lengths(encoder, lengths))
        memory = torch.cuda.max_memory_allocated() if cuda else 0
        forwards = [_seconds(first, last) for first, last in timed]
        packs_of_steps.close()
        return Result([float(loss) for loss in losses], sum(lengths), total, seconds, waited, forwards, memory)

    def clock(self) -> Any:
        """Now: an event of the GPU's stream, or the clock's time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for the GPU, and for the other ranks where there are any."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():
            dist.barrier()

    def peak(self) -> float:
        """FLOPs per second of plain GEMMs, of all ranks together."""
        side, count = PEAK_GEMMS[self.device.type]
        job, measure = gemms(side, count, self.device, self.dtype), timer(self.device)
        job()
        self.synchronize()
        seconds = statistics.median(measure(job).seconds for _ in range(3))
        total = torch.tensor(2 * side**3 * count / seconds, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def report(self, name: str, results: list[Result], peak: float) -> None:
        """One line."""
        seconds = max(result.seconds for result in results)
        share = 3 * sum(result.flops for result in results) / seconds / peak
        steps = zip(*(result.forwards for result in results), strict=True)
        balance = statistics.fmean(statistics.fmean(step) / max(step) for step in steps)
        waited = max(result.waited for result in results) / seconds
        memory = max(result.memory for result in results) / 2**30
        print(
            f"{name:24} {_rate(results):10,.0f} tokens/s {share:6.3f} of peak, balance {balance:.3f}, "
            f"{waited:.1%} waiting for data, {memory:.1f} GiB",
            flush=True,
        )


def photos(number: int, patch_size: int) -> list[bytes]:
    """JPEGs with the sizes of the workload "mixed", parts of the example photos; the same on every rank."""
    images = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]
    files, images_in_turn = [], itertools.cycle(images)
    for rows, columns in mixed(number, seed=1).grids:
        file = io.BytesIO()
        next(images_in_turn).resize((columns * patch_size, rows * patch_size)).save(file, "JPEG", quality=88)
        files.append(file.getvalue())
    return files


def shard(encoder: Any, blocks: int) -> None:
    """FSDP2 by groups of so many layers, each fetching the next."""
    groups = [list(encoder.layers[start : start + blocks]) for start in range(0, len(encoder.layers), blocks)]
    for group in groups:
        fully_shard(group)
    fully_shard(encoder)
    for (first, *_), (following, *_) in itertools.pairwise(groups):
        first.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([first])


def _seconds(first: Any, last: Any) -> float:
    return last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3


def _rate(results: list[Result]) -> float:
    return sum(result.tokens for result in results) / max(result.seconds for result in results)


def _compare(actual: list[float], expected: list[float], reordered: list[float]) -> None:
    """Print how far losses are from those of one process, and how far these are in the other order."""

    def difference(losses: list[float]) -> float:
        return max(abs(loss - other) / other for loss, other in zip(losses, expected, strict=True))

    print(
        f"  losses {expected[0]:.5f} to {expected[-1]:.5f}; largest relative difference {difference(actual):.1e}, of "
        f"packs in the other order {difference(reordered):.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()

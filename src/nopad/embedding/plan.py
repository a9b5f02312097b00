"""`nopad plan`: what a job will take, by embedding a sample of its inputs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nopad.counts import counted
from nopad.embedding.actors.actor import LoadedEncoder
from nopad.embedding.actors.node_samples import NodeSample, sample_nodes
from nopad.embedding.borders import Borders
from nopad.embedding.folder import JobFolder
from nopad.embedding.in_process import InProcess
from nopad.embedding.inputs.source_bytes import SourceBytes
from nopad.embedding.inputs.sources import Listing
from nopad.embedding.inputs.stamps import StampSpool
from nopad.embedding.sampling import Sample, take_sample
from nopad.embedding.settings import Settings
from nopad.embedding.table.errors import check_place
from nopad.embedding.table_run import borders_of, list_sources, lists_whole_tars, too_many_of
from nopad.embedding.workers import check_features
from nopad.environment import num_cores
from nopad.storage.addresses import is_address


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job will take.

    Attributes:
        inputs, sample: how many there are, and were embedded.
        tars: whole tars in words, where the number of inputs is an estimate.
        failures: of the sample: reasons and how many inputs have each, the most frequent first.
        listing_seconds, start_seconds: to list the sources, and to start Python (of the command alone), load and
            compile the encoder, start the decode processes and end.
        seconds: to embed all inputs.
        per_second: images of one encoder, as the whole pipeline goes on this machine.
        encoder_per_second: images that one encoder takes if it never waits; 0 where nothing of the sample was embedded.
        decode_core_seconds: of one core to read and decode an image.
        cores, gpus: of this machine; no GPUs where the device is its CPU.
        cores_per_encoder: those that decode as fast as one encoder takes images.
        limit: what the run waits for.
        patches: of an image on average.
        shard_rows, shards: most rows of a shard, and how many shards there will be.
        vector_bytes, token_bytes: of the whole table, without tokens and for tokens alone.
        stores_tokens: whether the job keeps tokens.
        free_bytes: on the disk of the table, `None` where it was not named.
        too_many_files: what to do about the number of shards, if anything.
        nodes: of a Ray cluster, and what of the sample each cannot read.
    """

    inputs: int
    sample: int
    failures: dict[str, int]
    listing_seconds: float
    start_seconds: float
    seconds: float
    per_second: float
    encoder_per_second: float
    decode_core_seconds: float
    cores: int
    gpus: int
    cores_per_encoder: float
    limit: str
    patches: float
    shard_rows: int
    shards: int
    vector_bytes: int
    token_bytes: int
    stores_tokens: bool
    free_bytes: int | None
    too_many_files: str = ""
    nodes: tuple[NodeSample, ...] = ()
    tars: str = ""

    @property
    def total_seconds(self) -> float:
        """Of the whole job with one encoder."""
        return self.listing_seconds + self.start_seconds + self.seconds

    @property
    def table_bytes(self) -> int:
        """What the job writes."""
        return self.vector_bytes + (self.token_bytes if self.stores_tokens else 0)

    @property
    def warnings(self) -> list[str]:
        """What to change before the job begins."""
        lines = []
        if (failed := sum(self.failures.values())) > 0.01 * self.sample:
            lines.append(f"{failed / self.sample:.1%} of the sample would be failed rows: see the reasons")
        if self.too_many_files:
            lines.append(self.too_many_files)
        if self.free_bytes is not None and self.table_bytes > self.free_bytes:
            lines.append("the table is larger than the free space on its disk")
        machines = [(node.host, node.cores, node.gpus) for node in self.nodes if node.cores]
        for host, cores, gpus in machines or [("this machine", self.cores, self.gpus)]:
            if self.cores_per_encoder > cores / max(1, gpus):
                has = f"{cores} for {counted(gpus, 'GPU')}" if gpus > 1 else f"{cores}"
                lines.append(f"decoding needs {self.cores_per_encoder:.0f} cores for each encoder, {host} has {has}")
        for node in self.nodes:
            if node.problem:
                lines.append(f"{node.host} has not read the sample: {node.problem}")
            elif failed := sum(node.unreadable.values()):
                reason = next(iter(node.unreadable))
                lines.append(f"{node.host} cannot read {failed:,} of the sample of {self.sample:,}: {reason}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        derived = {"total_seconds": self.total_seconds, "table_bytes": self.table_bytes, "warnings": self.warnings}
        return {**asdict(self), **derived}


def plan(
    sources: Sequence[str],
    settings: Settings,
    *,
    sample: int | None = None,
    out: str | None = None,
    ray: str | None = None,
) -> Plan:
    """Embed a sample of the inputs, into a folder that is removed again, and work out what all of them will take.

    Args:
        settings: of the job.
        sample: inputs at most; unless given `SAMPLE`, and more where these take less than `MIN_SECONDS`.
        out: the table's folder, for the free space on its disk, and for what was listed: the job finds it there.
        ray: the cluster on whose nodes the sample is read as well, as `nopad.embed` takes it.

    Raises:
        ValueError, OSError, ImportError: as `nopad.embed`.
    """
    check_features(settings.model, settings)
    if out is not None and not is_address(out):
        check_place(Path(out))
    start = time.perf_counter()
    cache = None if out is None else JobFolder(out).listing_cache()
    listing = list_sources(sources, settings, cache, whole_tars=lists_whole_tars(settings, {}))
    inputs = listing.inputs
    by_bytes = settings.shard_size is None
    settings = settings.for_inputs(listing.num_images, {})
    sizes = SourceBytes.of(inputs, StampSpool.of(inputs, contents=False)) if by_bytes else None
    borders = borders_of(listing, settings, sizes)
    listed = time.perf_counter()
    local = replace(settings, actors=None, ray=None, part=None, retry_failed=False, unreachable_rows=True)
    maker = InProcess(local, None, listing.num_images, {}, estimates=False)
    loaded = time.perf_counter()
    taken = take_sample(listing, sample, maker, local, list(sources))
    nodes = () if ray is None else tuple(sample_nodes(ray, list(taken.inputs), local))
    free = None if out is None or is_address(out) else _free(Path(out))
    return _plan(taken, listing, borders, local, maker.encoder, (listed - start, loaded - listed), free, nodes)


def _plan(
    sample: Sample,
    listing: Listing,
    borders: Borders,
    settings: Settings,
    encoder: LoadedEncoder,
    seconds: tuple[float, float],
    free_bytes: int | None,
    nodes: tuple[NodeSample, ...],
) -> Plan:
    number, stats, num_inputs = len(sample.inputs), sample.summary.stats, sample.num_images
    scale = num_inputs / number
    width = encoder.hidden_size * 2 * len(encoder.sizes.layers or (0,))
    sampled_tokens = stats.patches * width // settings.tokens_pool**2
    vectors = sample.num_bytes - sampled_tokens if settings.tokens else sample.num_bytes
    encoder_per_second = number / stats.device_seconds if stats.device_seconds else 0.0
    decode = stats.decode_seconds / number
    return Plan(
        inputs=num_inputs,
        sample=number,
        failures=sample.failures,
        listing_seconds=seconds[0],
        start_seconds=seconds[1] + sample.start_seconds,
        seconds=num_inputs / sample.per_second,
        per_second=sample.per_second,
        encoder_per_second=encoder_per_second,
        decode_core_seconds=decode,
        cores=num_cores(),
        gpus=torch.cuda.device_count() if encoder.device == "cuda" else 0,
        cores_per_encoder=decode * encoder_per_second,
        limit=str(sample.summary.limit),
        patches=stats.patches / max(1, number - sample.summary.failed),
        shard_rows=max(_rows(listing, sample, places) for places in borders),
        shards=len(borders),
        vector_bytes=round(max(0, vectors) * scale),
        token_bytes=round(sampled_tokens * scale),
        stores_tokens=settings.tokens,
        free_bytes=free_bytes,
        too_many_files=too_many_of(listing, borders),
        nodes=nodes,
        tars=listing.whole_tars.describe() if listing.whole_tars else "",
    )


def _rows(listing: Listing, sample: Sample, places: range) -> int:
    """How many rows a shard has, by the sample."""
    if not (tars := listing.whole_tars.within(places)):
        return len(places)
    in_tars = sample.num_images - len(listing.inputs) + len(listing.whole_tars)
    return len(places) - len(tars) + in_tars * tars.num_bytes // listing.whole_tars.num_bytes


def _free(folder: Path) -> int:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free

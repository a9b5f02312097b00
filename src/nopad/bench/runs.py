"""The benchmark: every contestant over every workload, in turn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from nopad.bench.candidates import Images, Peer, contestants
from nopad.bench.defaults import Defaults, defaults_on
from nopad.bench.report import BenchReport, Ceiling, Facts, Row
from nopad.bench.runner import block_parameters, race
from nopad.bench.timing import meter
from nopad.bench.workloads import Workload, fixed, mixed
from nopad.environment import device_name, dtype_name, versions
from nopad.loading import load

logger = logging.getLogger(__name__)

RECOMPILES = 64
"""Graphs of one function that a run may need: its contestants compile for every capacity and size."""


def bench(
    checkpoint: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    workload: Literal["mixed", "224", "all"] = "mixed",
    images: int | None = None,
    capacities: Sequence[int] | None = None,
    peers: bool = True,
    compile: bool | None = None,
    float8: bool = False,
    runs: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = logger.info,
) -> BenchReport:
    """Measure the packed encoder and the original on the same weights and images, patches to normed tokens.

    Pixels are random and on the device before the clock starts; a run is the whole workload; contestants run in turn,
    and around each the workload's ceiling, a plain matrix product in `dtype`; each one's features of some images
    are compared with the packed encoder's on each of these alone.

    Args:
        checkpoint, device, dtype, attention, revision: as `nopad.load` takes them.
        workload: `"mixed"` sizes, `"224"` pixels (or the model's own fixed size), or `"all"` of them.
        images: of each workload.
        capacities: tokens per pack; one named twice runs once.
        peers: run the original, too.
        compile: run what is compiled, too.
        float8: run the packed encoder with `precision="fp8"`, too, compiled; then all that is compiled runs.
        runs: timed runs of each contestant.
        seed: of sizes and pixels.
        trust_remote_code: run the checkpoint's own code where its original is not part of transformers.
        progress: told what is being done.

    What is `None` follows from the device, see `nopad.bench.defaults`.

    Raises:
        ValueError: an argument out of its range, a capacity below the largest image, or a checkpoint that does not
            load.
    """
    if float8 and compile is False:
        raise ValueError("float8: runs the packed encoder compiled, got compile=False too; give one of them")
    device = torch.device(device)
    usual = defaults_on(device.type)
    asked = Defaults(
        usual.images if images is None else images,
        tuple(dict.fromkeys(usual.capacities if capacities is None else capacities)),
        usual.runs if runs is None else runs,
        usual.compile or float8 if compile is None else compile,
    )
    _check(device, workload, asked)
    progress(f"loading {checkpoint}")
    encoder = load(checkpoint, revision=revision, device=device, dtype=dtype, attention=attention)
    squares = fixed(asked.images, encoder.default_preprocessing.size or 224, encoder.patch_size)
    chosen = [mixed(asked.images, seed)] * (workload != "224") + [squares] * (workload != "mixed")
    _check_capacities(asked.capacities, chosen, encoder.num_prefix_tokens)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    peer = Peer.of(encoder, str(checkpoint), **options) if peers else None
    measure = meter(device)
    facts: list[Facts] = []
    rows: list[Row] = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if asked.compile:
            from torch._dynamo import config as dynamo

            # Beyond the limit a function runs uncompiled and hardly says so.
            stack.enter_context(dynamo.patch(recompile_limit=RECOMPILES))
        of_squares = Images.of(squares, encoder, seed)
        for one in chosen:
            ours = of_squares if one is squares else Images.of(one, encoder, seed)
            found, ceiling = race(
                encoder,
                contestants(encoder, peer, ours, of_squares, asked.capacities, float8),
                workload=one.name,
                compile=asked.compile,
                runs=asked.runs,
                measure=measure,
                progress=progress,
            )
            rows += found
            facts.append(_facts(one, ceiling))
    return BenchReport(
        checkpoint=str(checkpoint),
        family=encoder.family,
        original=None if peer is None or peer.model is None else peer.about,
        no_original="not asked for" if peer is None else peer.about if peer.model is None else None,
        device=device_name(device),
        dtype=dtype_name(dtype),
        attention=encoder.attention,
        versions=versions(device),
        parameters=block_parameters(encoder),
        seed=seed,
        runs=asked.runs,
        workloads=tuple(facts),
        rows=tuple(rows),
    )


def _check(device: torch.device, workload: str, asked: Defaults) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, which this can time, got {str(device)!r}")
    if workload not in ("mixed", "224", "all"):
        raise ValueError(f"workload: expected 'mixed', '224' or 'all', got {workload!r}")
    if asked.images < 1 or asked.runs < 1 or not asked.capacities:
        raise ValueError(
            f"expected images ≥ 1, runs ≥ 1 and at least one capacity, got {asked.images}, {asked.runs} and "
            f"{list(asked.capacities)}"
        )


def _check_capacities(capacities: Sequence[int], workloads: Sequence[Workload], prefix: int) -> None:
    longest = max(max(workload.lengths) for workload in workloads) + prefix
    if min(capacities) < longest:
        raise ValueError(f"capacities: expected at least {longest} tokens, the largest image's, got {min(capacities)}")


def _facts(workload: Workload, ceiling: Ceiling) -> Facts:
    lengths = workload.lengths
    return Facts(workload.name, len(lengths), len(set(workload.grids)), workload.tokens, max(lengths), ceiling)

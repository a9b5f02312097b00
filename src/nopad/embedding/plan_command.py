"""`nopad plan`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from nopad.command_options import SUCCESS, resolve_device
from nopad.counts import check_count, counted
from nopad.embedding.command import add_job_options, check_packages
from nopad.embedding.inputs.names import check_source
from nopad.embedding.progress import duration
from nopad.embedding.settings import Settings
from nopad.pipeline import process_server
from nopad.storage.addresses import is_address
from nopad.storage.stores import check_writable
from nopad.terminal import import_transformers, json_text, print_error, print_summary, printable

if TYPE_CHECKING:
    from nopad.embedding.actors.node_samples import NodeSample
    from nopad.embedding.plan import Plan

_MAX_REASONS = 5

_OF_A_RUN = ("actors", "part", "ray", "stall", "update", "content_hash", "retry_failed", "unreachable_rows")
"""Options of how a job is run, which change nothing of a sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad plan`: those of `nopad embed` that concern what is made, and the size of the sample."""
    add_job_options(parser, without=_OF_A_RUN)
    parser.add_argument("--out", metavar="DIR", help="of the table; of a folder, its free space is printed")
    ray = "read the sample on every node of this Ray cluster, too: HOST:PORT, or auto for the one of this machine"
    parser.add_argument("--ray", metavar="ADDRESS", help=ray)
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="inputs to embed (default: 512, and more where these take less than 8 s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON; null for NaN and infinity")


def run(options: argparse.Namespace) -> int:
    """Embed a sample, print what the job will take, and return the exit status.

    Raises:
        ValueError, OSError, ImportError: as `nopad embed`.
    """
    check_packages()
    check_count("--sample", 1 if options.sample is None else options.sample)
    if options.out is not None and is_address(options.out):
        check_writable("--out", options.out)
    for source in options.sources:
        check_source("SOURCE", source)
    settings = Settings(
        **{option.name: getattr(options, option.name) for option in fields(Settings) if option.name not in _OF_A_RUN}
    )
    print_error("nopad plan: listing the sources, then embedding a sample")
    process_server.start()  # it imports torch while this process does
    import_transformers()
    from nopad.embedding.plan import plan

    resolve_device(options.device)
    imported = time.perf_counter() - options.start  # Python and what it imports, which a job does as well
    planned = plan(options.sources, settings, sample=options.sample, out=options.out, ray=options.ray)
    planned = replace(planned, start_seconds=planned.start_seconds + imported)
    print_summary(json_text(planned.to_dict()) if options.json else describe(planned))
    if options.json:
        for line in planned.warnings:
            print(printable(line), file=sys.stderr)
    return SUCCESS


def describe(plan: Plan) -> str:
    """A plan for a terminal."""
    failed = sum(plan.failures.values())
    before = duration(plan.listing_seconds + plan.start_seconds)
    inputs = f"{f'{plan.tars}, about ' if plan.tars else ''}{plan.inputs:,} inputs"
    lines = [
        f"{inputs}, listed in {duration(plan.listing_seconds)}; of a sample of {plan.sample:,} "
        f"{failed:,} fail ({failed / plan.sample:.1%}), the others have {plan.patches:,.0f} patches on average",
        *(f"  {number:,} × {reason}" for reason, number in [*plan.failures.items()][:_MAX_REASONS]),
        f"time: {duration(plan.total_seconds)} with one encoder, {before} of it to list and start, the rest at "
        f"{plan.per_second:,.1f} images/s; {plan.limit}",
        _encoder(plan),
        f"table: {size(plan.vector_bytes)} of vectors"
        + (f" and {size(plan.token_bytes)} of tokens" if plan.stores_tokens else "")
        + f" in {counted(plan.shards, 'file')} of up to {counted(plan.shard_rows, 'row')}"
        + ("" if plan.stores_tokens else f"; --tokens adds {size(plan.token_bytes)}")
        + ("" if plan.free_bytes is None else f"; {size(plan.free_bytes)} are free"),
        *(f"{node.host}: {node_summary(node)}" for node in plan.nodes),
        *(f"note: {line}" for line in plan.warnings),
    ]
    return "\n".join(map(printable, lines))


def _encoder(plan: Plan) -> str:
    if not plan.encoder_per_second:
        return "encoder: its speed is not known, since nothing of the sample was embedded"
    gpus = f" for {counted(plan.gpus, 'GPU')}" if plan.gpus else ""
    return (
        f"encoder: {plan.encoder_per_second:,.1f} images/s if it never waits; reading and decoding take "
        f"{1000 * plan.decode_core_seconds:,.1f} ms of a core for each image: {plan.cores_per_encoder:,.1f} cores for "
        f"each encoder, of the {plan.cores:,}{gpus} here"
    )


def node_summary(node: NodeSample) -> str:
    """What a node has, and what it cannot read."""
    has = f"{counted(node.cores, 'core')}, {counted(node.gpus, 'GPU')}"
    failed = sum(node.unreadable.values())
    read = f"cannot read {failed:,} of the sample" if failed else "reads the whole sample"
    return f"{has}; {node.problem or read}"


def size(number: float) -> str:
    """`"4.6 MB"`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} PB"

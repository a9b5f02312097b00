"""`nopad embed`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING

from nopad.terminal import device_of, show

if TYPE_CHECKING:
    from nopad.embedding.run import Summary

DTYPES = ("float32", "bfloat16", "float16")
DONE, NOTHING_EMBEDDED, INTERRUPTED = 0, 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `nopad embed`."""
    sources = "folders, globs, list files (.txt), WebDataset tars, Parquet files, datasets saved to disk, videos"
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=sources)
    parser.add_argument("--model", required=True, help="Hub name, folder, weights file, or untrained:<published name>")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the table; go on with the same command")
    parser.add_argument("--tokens", action="store_true", help="store each picture's tokens, too, in float16")
    parser.add_argument("--max-patches", type=int, metavar="N", help="most patches of a picture, aspect ratio kept")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; cuda where there is one, unless given")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model (default: the checkpoint's own)")
    parser.add_argument("--attention", default="auto", help="kernel (default: the best there is)")
    parser.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per core)")
    capacity = "tokens per pack (default: 16384, on a CPU 2048)"
    parser.add_argument("--capacity", type=int, metavar="N", help=capacity)
    resize = "torch is fast, pil bit-exact with transformers' processors (default: torch)"
    parser.add_argument("--resize", choices=("torch", "pil"), default="torch", help=resize)
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a video (default: 8)")
    pixels = "pictures of more are failures (default: 178956970, as Pillow)"
    parser.add_argument("--max-pixels", type=int, metavar="N", help=pixels)
    column = "column of image bytes in Parquet files and datasets, where it is not clear"
    parser.add_argument("--image-column", metavar="NAME", help=column)
    in_table = "of the embedding in the table (default: float32)"
    parser.add_argument("--embedding-dtype", choices=("float32", "float16"), default="float32", help=in_table)
    lists = "fixed-size lists, or variable ones for databases that cannot read those (default: fixed)"
    parser.add_argument("--embedding-list", choices=("fixed", "variable"), default="fixed", help=lists)
    parser.add_argument("--shard-size", type=int, metavar="N", help="rows of a shard (default: 2048, with tokens 512)")
    parser.add_argument("--retry-failed", action="store_true", help="try failed rows of finished shards again")
    parser.add_argument("--actors", type=int, metavar="N", help="run on Ray with N actors")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def run(options: argparse.Namespace) -> int:
    """Embed, say what there is now, and return the exit status.

    0: every input has its row; 1: not one could be embedded; 130: stopped, and the same command goes on.

    Raises:
        ValueError, OSError, ImportError: wrong use, or a folder that cannot be written.
    """
    from transformers.utils import logging as transformers_logging

    for package in ("filelock", "pyarrow", "rich"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs {package}: pip install 'nopad[embed]'")
    from nopad.embedding.api import embed
    from nopad.embedding.progress import display
    from nopad.embedding.settings import Settings

    transformers_logging.disable_progress_bar()
    device_of(options.device)
    max_pixels = Settings.max_pixels if options.max_pixels is None else options.max_pixels
    go_on = f"to go on: {_command(options)}"
    try:
        with (
            stop_on_signals() as stop,
            pillow_takes(max_pixels),
            display(sys.stderr) as shown,
            redirect_stdout(sys.stderr),  # Ray prints to it when an actor dies; it is for the summary alone
        ):
            summary = embed(
                options.sources,
                options.out,
                model=options.model,
                revision=options.revision,
                device=options.device,
                dtype=options.dtype,
                attention=options.attention,
                tokens=options.tokens,
                max_patches=options.max_patches,
                resize=options.resize,
                capacity=options.capacity,
                frames=options.frames,
                max_pixels=max_pixels,
                embedding_dtype=options.embedding_dtype,
                embedding_list=options.embedding_list,
                shard_size=options.shard_size,
                image_column=options.image_column,
                workers=options.workers,
                retry_failed=options.retry_failed,
                actors=options.actors,
                stop=stop,
                progress=shown,
            )
    except KeyboardInterrupt:
        print(f"stopped at once, the shard in hand is lost, finished ones are kept; {go_on}", file=sys.stderr)
        return INTERRUPTED
    if options.json:
        show(json.dumps(summary.to_dict(), indent=2))
    else:
        show(describe(summary).encode("utf-8", "backslashreplace").decode())
    if summary.to_go:
        print(f"stopped with {summary.to_go:,} inputs to go; {go_on}", file=sys.stderr)
        return INTERRUPTED
    return NOTHING_EMBEDDED if summary.failed == summary.rows else DONE


def _command(options: argparse.Namespace) -> str:
    """What to type to run this once more."""
    program = sys.argv[0]
    if os.path.basename(program) == "__main__.py":
        return shlex.join([sys.executable, "-m", "nopad", *options.arguments])
    return shlex.join([program, *options.arguments])


@contextmanager
def pillow_takes(max_pixels: int) -> Iterator[None]:
    """Let Pillow open pictures of as many pixels, which its own limit would refuse, and be silent on damaged ones."""
    from PIL import Image

    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(before or 0, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        with suppress(OSError, RuntimeError):  # RuntimeError where the signal came while this stream was written to
            print("finishing the shard in hand; once more stops at once and loses it", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe(summary: Summary) -> str:
    """A summary for a terminal."""
    from nopad.embedding.progress import clock

    stats = summary.stats
    lines = [f"{summary.folder}: {summary.rows - summary.failed:,} embedded, {summary.failed:,} failed"]
    if summary.done and summary.seconds:
        lines.append(
            f"this run: {summary.done:,} in {clock(summary.seconds)}, {stats.images / summary.seconds:,.1f} images/s, "
            f"{stats.patches / summary.seconds:,.0f} tokens/s, fill {stats.fill:.1%}"
        )
    elif not summary.to_go:
        lines.append("this run: nothing to do, every input has its row")
    if summary.left_out:
        counts = ", ".join(f"{number:,} {suffix or 'without suffix'}" for suffix, number in summary.left_out.items())
        lines.append(f"left out as no pictures or videos: {counts}; name them in a list file to take them")
    lines += summary.changes
    if summary.failed:
        shards = summary.shards_with_failures
        lines.append(
            f"failures are rows with status 'failed' and the reason in 'error': "
            f"nopad.read_features({summary.folder!r}).failures, in {len(shards)} shard{'s' if len(shards) > 1 else ''} "
            f"({shards[0]}{', …' if len(shards) > 1 else ''}); --retry-failed tries them again, but for "
            f"what could not be listed, which takes another folder"
        )
    return "\n".join(lines)

"""Actors that go wrong by the names of pictures in their shards, as hardware, kernels and mounts do."""

import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace

from nopad.embedding.actors.actor import ShardMaker
from nopad.embedding.actors.node_samples import unreadable
from nopad.embedding.inputs import archives, reaching
from nopad.embedding.inputs.listing import Input
from nopad.embedding.settings import Settings
from nopad.pipeline.worker import Worker


class FaultyMaker(ShardMaker):
    """Ends, hangs or waits where an image is decoded whose name says so: `kill-….jpg`, `stop-….jpg`, `wait-….jpg`.

    It waits for the file `GATE` of its environment, and finds no image where that has `UNMOUNTED`.
    """

    def __init__(self, config):
        super().__init__(config)
        _watch()


class OneByOneMaker(FaultyMaker):
    """Is never ready for a second shard."""

    on_ready = property(lambda self: lambda: None, lambda self, value: None)


class TarlessMaker(ShardMaker):
    """Cannot reach tars whose name begins with `lost-`."""

    def __init__(self, config):
        super().__init__(config)
        real, reaching.retry.waits = archives.open_source, ()

        def open_source(path, *arguments):
            if os.path.basename(path).startswith(b"lost-"):
                raise OSError(errno.EIO, "Input/output error")
            return real(path, *arguments)

        archives.open_source = open_source


def _watch():
    real = Worker.run_in_parts

    def run(self, groups, read, **options):
        def media(item):
            if item.kind != "broken" and item.id.startswith("kill-"):
                os.kill(os.getpid(), signal.SIGKILL)
            if item.kind != "broken" and item.id.startswith("stop-"):
                os.kill(os.getpid(), signal.SIGSTOP)
            while item.id.startswith("wait-") and not os.path.exists(os.environ["GATE"]):
                time.sleep(0.02)
            return read(_away(item))

        return real(self, groups, media, **options)

    Worker.run_in_parts = run


def unreadable_where_unmounted(settings: Settings, items: Sequence[Input]) -> dict[str, int]:
    """As `unreadable`, on a node whose environment has `UNMOUNTED`: the sources are not mounted there."""
    return unreadable(settings, [*map(_away, items)])


def _away(item: Input) -> Input:
    return replace(item, path=item.path + b".none") if os.environ.get("UNMOUNTED") else item

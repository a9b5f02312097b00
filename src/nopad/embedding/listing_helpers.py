"""Tars and Parquet files that several processes list for a job: of this machine, of a cluster, or its parts."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from nopad.embedding.actors.starting import StartingActors
from nopad.embedding.folder import JobFolder
from nopad.embedding.inputs.shares import Share, ShareOptions, keep_share, num_files
from nopad.embedding.settings import Settings
from nopad.embedding.table.paths import absolute
from nopad.environment import num_cores
from nopad.storage.addresses import scheme_of

logger = logging.getLogger(__name__)

MIN_FILES = 32
"""New tars and Parquet files of a share at least: a process takes seconds to start."""

MAX_PROCESSES = 8
"""Processes of one machine."""

_POLL_SECONDS = 0.2
_END_SECONDS = 10.0  # to write what was listed, after a stop
_REPORT_SECONDS = 10.0  # until the first line on how far they are; then as long as it has taken so far


def list_in_shares(
    sources: Sequence[str],
    settings: Settings,
    folder: JobFolder,
    starting: StartingActors | None,
    stop: threading.Event,
    *,
    whole_tars: bool = False,
) -> None:
    """List tars and Parquet files of a job's sources and keep them beside its table, where `list_inputs` finds them.

    A part lists its share. Otherwise processes do: on all nodes where there is a Ray cluster, else of this machine.
    What they cannot list is left to `list_inputs`.

    Args:
        whole_tars: see `list_inputs`; those are not listed.

    Raises:
        InterruptedError: `stop` was set.
        ValueError, OSError, ConnectionError: of a part as `list_inputs`; of a cluster see `StartingActors`.
    """

    def check() -> None:
        if stop.is_set():
            raise InterruptedError("stopped while the sources were listed")

    how = settings.image_column, settings.id_column, settings.hidden, settings.input_timeout
    options = ShareOptions(tuple(sources), *how, whole_tars)
    all_files, number = num_files(options, folder.listing_cache(), check)
    if settings.part is not None:
        keep_share(options, folder.listing_cache(), Share.of(*settings.part, all_files), check)
        return
    is_on_ray = starting is not None and starting.is_on_ray
    if number < 2 * MIN_FILES or (is_on_ray and not all(scheme_of(name) or os.path.isabs(name) for name in sources)):
        return
    progress = _Progress(folder, number, check)
    if is_on_ray:
        assert starting is not None
        if starting.wait() is not None:
            _on_nodes(options, absolute(folder.path), (all_files, number), progress)
    elif (total := min(number // MIN_FILES, MAX_PROCESSES, num_cores())) > 1:
        shares = [Share.of(share, total, all_files) for share in range(total)]
        _by_processes(options, absolute(folder.path), shares, progress)


class _Progress:
    """Logs how many files are listed, now and then."""

    def __init__(self, folder: JobFolder, number: int, check: Callable[[], None]) -> None:
        self.check = check
        self._folder = folder
        self._number = number
        self._before = folder.listing_cache().num_files
        self._start, self._next = time.monotonic(), _REPORT_SECONDS

    def report(self) -> None:
        """Log it if it is time; raises what `check` raises."""
        self.check()
        if (seconds := time.monotonic() - self._start) >= self._next:
            self._next = 2 * seconds
            listed = self._folder.listing_cache().num_files - self._before
            logger.info("listing: %s of %s tars and Parquet files so far", f"{listed:,}", f"{self._number:,}")


def _by_processes(options: ShareOptions, folder: str, shares: Sequence[Share], progress: _Progress) -> None:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for share in shares:
            processes.append(_process((options, folder, share)))
        while any(process.poll() is None for process in processes):
            progress.report()
            time.sleep(_POLL_SECONDS)
    finally:
        for process in processes:
            assert process.stdin is not None
            with suppress(OSError):  # it has ended
                process.stdin.close()
        end = time.monotonic() + _END_SECONDS
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()


def _process(request: tuple[ShareOptions, str, Share]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from nopad.embedding.listing_helpers import main; main()"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=2,  # stdout is for the command's summary
        start_new_session=True,  # a terminal's Ctrl-C is for the command alone
    )
    assert process.stdin is not None
    with suppress(OSError):  # it has died, and its share is listed by the command
        process.stdin.write(pickle.dumps(request))
        process.stdin.flush()
    return process


def main() -> None:
    """List a share that stdin names; ends once that is closed."""
    logging.getLogger("nopad").setLevel(logging.ERROR)
    stop = threading.Event()
    options, folder, share = pickle.load(sys.stdin.buffer)

    def watch() -> None:
        sys.stdin.buffer.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    list_share(options, folder, share, stop)
    os._exit(0)  # not held up by threads that read ahead


def list_share(options: ShareOptions, folder: str, share: Share, stop: threading.Event | None = None) -> None:
    """List a share and keep it beside the table in `folder`; `list_inputs` raises what goes wrong."""

    def check() -> None:
        if stop is not None and stop.is_set():
            raise InterruptedError

    with suppress(OSError, ValueError):
        keep_share(options, JobFolder(folder).listing_cache(), share, check)


def _on_nodes(options: ShareOptions, folder: str, files: tuple[int, int], progress: _Progress) -> None:
    import ray

    from nopad.embedding.actors.ray_head import ray_errors

    with ray_errors():
        cores = (int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        total = min(files[1] // MIN_FILES, sum(min(number, MAX_PROCESSES) for number in cores))
        task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(list_share)
        calls = [task.remote(options, folder, Share.of(number, total, files[0])) for number in range(total)]
        try:
            while calls:
                calls = ray.wait(calls, num_returns=len(calls), timeout=_POLL_SECONDS)[1]
                progress.report()
        finally:
            for call in calls:
                ray.cancel(call, force=True)

"""Decoding in processes: what a hostile input may do there, and what becomes of the others."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe

import numpy as np
import psutil
import pytest
import torch
from pipeline.hostile_decoder import HostileDecoder

from nopad.pipeline import process_server
from nopad.pipeline.decode_channel import DecodeChannel
from nopad.pipeline.image_processor import ImageProcessor
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget, available_memory
from nopad.pipeline.process_server import ProcessServerError
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError


@pytest.fixture(scope="module")
def image_processor(encoder) -> ImageProcessor:
    return ImageProcessor.of(encoder)


@pytest.fixture(scope="module")
def processes(image_processor):
    return DecodeProcesses(HostileDecoder(), image_processor, timeout=2)


def prepare(processes, data: str):
    return processes.prepare(data, MemoryBudget(1 << 30).reservation())


def test_patches_are_those_of_this_process(processes, image_processor):
    decoder = HostileDecoder()
    for data in ("3 4", "1 1", "7 2"):
        image, expected = prepare(processes, data), image_processor(decoder(data))
        assert (image.grid, image.width, image.height) == (expected.grid, expected.width, expected.height)
        np.testing.assert_array_equal(image.patches, expected.patches)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("loop", "decoding it takes more than 2 s; input_timeout sets another limit"),
        ("loop in the header", "decoding it takes more than 2 s; input_timeout sets another limit"),
        ("crash", "its decoder crashed; a damaged file, or too little memory"),
        ("allocate", "decoding it takes more memory than its header says"),
        ("bug", "unexpected KeyError: 'a bug'"),
        ("damaged", "truncated"),
    ],
)
def test_hostile_input_is_a_failure_and_the_next_is_decoded(processes, data, reason, caplog):
    with pytest.raises(ImageError) as error:
        prepare(processes, data)
    assert error.value.reason == reason
    assert ("in __call__" in caplog.text) == (data == "bug")  # the traceback is logged
    assert prepare(processes, "3 4").grid == (1, 3, 4)


def test_image_larger_than_the_budget_is_a_failure(processes, image_processor):
    budget = MemoryBudget(10_000)
    small, large = budget.reservation(), budget.reservation()
    assert processes.prepare("1 1", small).grid == (1, 1, 1)
    small.finish_decoding(0)
    with pytest.raises(ImageError, match=r"takes about \d+ MB of memory, expected at most 0; set decode_memory"):
        processes.prepare("90 90", large)


def test_worker_gives_the_bits_of_decoding_in_threads(encoder):
    decoder, worker = HostileDecoder(), Worker(encoder, capacity=64, threads=3)
    groups = [[f"{n % 7 + 1} {n % 5 + 1}" for n in range(20)], ["2 2", "crash", "3 3"]]
    (first, second) = worker.run(groups, str, decoder=decoder)
    (expected,) = Worker(encoder, capacity=64, threads=3).run(groups[:1], decoder)
    assert [result.embedding.tobytes() for result in first] == [result.embedding.tobytes() for result in expected]
    assert [result.error is None for result in second] == [True, False, True]


def test_stop_does_not_wait_for_what_was_read_ahead(encoder):
    worker, stop = Worker(encoder, threads=2), threading.Event()
    results = worker.run([["2 2"], ["loop"] * 20], str, decoder=HostileDecoder(), stop=stop)
    start = time.monotonic()
    for _ in results:
        stop.set()
    assert time.monotonic() - start < 50  # each loop takes 60 s


def test_processes_end_with_their_owner(image_processor):
    processes = DecodeProcesses(HostileDecoder(), image_processor)
    before = set(psutil.Process().children(recursive=True))
    prepare(processes, "3 4")
    (own,) = set(psutil.Process().children(recursive=True)) - before
    del processes
    _, alive = psutil.wait_procs([own], timeout=20)
    assert alive == []


def test_processes_end_when_their_owner_is_killed(tmp_path):
    """In the middle of a decoder too."""
    code = """
import sys, threading, aimv2_checkpoints, nopad
from pathlib import Path
from pipeline.hostile_decoder import HostileDecoder
from nopad.pipeline.worker import Worker
original = aimv2_checkpoints.tiny_original()
folder = aimv2_checkpoints.write(Path(sys.argv[1]), original.state_dict(), original.config.to_dict())
worker = Worker(nopad.load(folder), timeout=None, threads=2)
results = worker.run([["2 2"], ["loop", "loop"]], str, decoder=HostileDecoder())
print(next(results) and "", flush=True)
threading.Event().wait()
"""
    path = os.pathsep.join(filter(None, sys.path))
    job = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    assert job.stdout.readline() == b"\n"
    processes = psutil.Process(job.pid).children(recursive=True)
    assert len(processes) > 2
    job.send_signal(signal.SIGKILL)
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert alive == []


def test_server_imports_nothing_from_the_current_folder(image_processor, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_server, "_server", None)
    assert prepare(DecodeProcesses(HostileDecoder(), image_processor), "3 4").grid == (1, 3, 4)


@pytest.mark.parametrize(
    "answers",
    [
        [pickle.dumps({"bytes": 1})],
        [b'{"bytes": "many"}'],
        [b'{"bytes": 96}', b'{"shape": [1000000, 1000000], "grid": [1, 1, 1], "width": 4, "height": 4}'],
        [b'{"bytes": 96}', b'{"shape": [1, 24], "grid": [1, 1, 1], "width": 4, "height": 4}', b"short"],
        [b'{"bytes": 96}', b'{"shape": [1]}'],
    ],
)
def test_nonsense_from_a_process_is_a_crash(image_processor, monkeypatch, answers):
    """A decoder that was taken over can answer anything."""

    def fork(self):
        mine, theirs = Pipe()
        for answer in answers:
            theirs.send_bytes(answer)
        with socket.socket(fileno=os.dup(theirs.fileno())) as end:
            end.shutdown(socket.SHUT_WR)
        kept.append(theirs)
        return DecodeChannel(mine, os.getpid(), torch.float32)

    kept = []
    monkeypatch.setattr(DecodeProcesses, "_fork", fork)
    with pytest.raises(ImageError, match="its decoder crashed"):
        prepare(DecodeProcesses(HostileDecoder(), image_processor), "3 4")
    assert len(kept) == 2


def test_a_server_that_cannot_start_ends_the_run(encoder, monkeypatch):
    monkeypatch.setattr(process_server, "_server", None)
    monkeypatch.setattr(process_server.sys, "executable", "/bin/false")
    with pytest.raises(ProcessServerError, match="cannot be started"):
        list(Worker(encoder).run([["2 2"]], str, decoder=HostileDecoder()))


# Memory


def test_reservations_are_granted_in_order_and_the_largest_alone():
    budget = MemoryBudget(100)
    first, large, last = (budget.reservation() for _ in range(3))
    order: list[str] = []

    def take(name: str, reservation, size: int) -> threading.Thread:
        def run() -> None:
            reservation.reserve(size)
            order.append(name)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    threads = [take("last", last, 10), take("large", large, 95), take("first", first, 50)]
    threads[2].join(10)
    assert order == ["first"]  # the large one does not fit beside it, and nothing overtakes
    first.finish_decoding(50)  # decoded, but not yet in a pack: the large one is let in, or nothing would go on
    threads[1].join(10)
    assert order == ["first", "large"]
    large.finish_decoding(5)
    threads[0].join(10)
    assert order == ["first", "large", "last"]
    for reservation in (first, large):
        reservation.release()
    assert budget.used == 10


def test_reservations_of_images_that_failed_before_pass_their_turn():
    budget = MemoryBudget(100)
    failed, image = budget.reservation(), budget.reservation()
    failed.finish_decoding(0)
    image.reserve(60)
    assert (budget.used, budget.decoding) == (60, 1)


def test_images_of_many_times_the_budget_are_all_embedded(encoder):
    decoder = HostileDecoder()
    images = ["40 40"] * 30
    size = ImageProcessor.of(encoder).peak_bytes(*decoder.measure(images[0]))
    worker = Worker(encoder, threads=4, memory=int(1.5 * size))
    (results,) = worker.run([images], decoder, measure=decoder.measure)
    assert [result.error for result in results] == [None] * 30


def test_a_budget_below_one(encoder):
    with pytest.raises(ValueError, match="memory: expected bytes ≥ 1, got 0"):
        list(Worker(encoder, memory=0).run([["2 2"]], HostileDecoder()))
    assert 0 < available_memory() <= psutil.virtual_memory().total

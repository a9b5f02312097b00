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
from pipeline.hostile_decoder import HostileDecoder

from nopad.pipeline import decode_work, process_server
from nopad.pipeline.decode_channel import DecodeChannel
from nopad.pipeline.decode_process import DecodeProgram
from nopad.pipeline.decode_queue import DecodeQueue, Task
from nopad.pipeline.image_processor import ImageProcessor
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget, available_memory
from nopad.pipeline.process_server import Attempts, Process, ProcessServerError
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


def prepare_all(image_processor, files, memory: int = 1 << 30, processes: int = 1, timeout: float | None = 20):
    """What becomes of files that are there at once, so that they go in batches."""
    gate, done, outcomes = threading.Event(), threading.Semaphore(0), {}
    budget = MemoryBudget(memory)
    decoding = DecodeProcesses(HostileDecoder(), image_processor, max_processes=processes, timeout=timeout)
    with pytest.MonkeyPatch.context() as patch:
        start = decoding._start
        patch.setattr(decoding, "_start", lambda: gate.wait() and start())
        for number, file in enumerate(files):
            reservation = budget.reservation()

            def keep(outcome, _, number=number, reservation=reservation):
                outcomes[number] = outcome
                reservation.finish_decoding(0)
                done.release()

            decoding.submit(file, reservation, keep)
        gate.set()
        for _ in files:
            assert done.acquire(timeout=100)
    return [outcomes[number] for number in range(len(files))]


def test_patches_are_those_of_this_process(processes, image_processor):
    decoder = HostileDecoder()
    for data in ("3 4", "1 1", "7 2"):
        image, expected = prepare(processes, data), image_processor(decoder(data))
        assert (image.grid, image.width, image.height) == (expected.grid, expected.width, expected.height)
        np.testing.assert_array_equal(image.data, expected.data)


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


def test_stop_does_not_wait_for_what_was_read_ahead(encoder, monkeypatch):
    monkeypatch.setattr(decode_work, "_BATCH_SECONDS", 0.5)  # the first image is in a batch with one that loops
    worker, stop = Worker(encoder, threads=2), threading.Event()
    results = worker.run([["2 2"], ["loop"] * 20], str, decoder=HostileDecoder(), stop=stop)
    start = time.monotonic()
    for _ in results:
        stop.set()
    assert time.monotonic() - start < 50  # each loop takes 60 s


@pytest.fixture
def own_server(monkeypatch):
    """A server for this test alone."""
    monkeypatch.setattr(process_server, "_server", None)
    server = process_server.start()
    yield psutil.Process(server._server.pid)
    process_server.start()._control.close()


def test_a_server_that_is_killed_while_nothing_is_decoded_is_started_again(image_processor, own_server):
    processes = DecodeProcesses(HostileDecoder(), image_processor, max_processes=3, timeout=20)
    processes._start_all()
    assert len(own_server.children()) == 3  # all idle
    own_server.kill()
    assert prepare(processes, "3 4").grid == (1, 3, 4)


def test_a_server_that_is_killed_while_it_starts_is_started_again(image_processor, own_server):
    own_server.kill()
    assert prepare(DecodeProcesses(HostileDecoder(), image_processor), "3 4").grid == (1, 3, 4)


def test_killed_servers_cost_no_image(encoder, own_server):
    """Each time images are being decoded, the same ones perhaps."""
    images = [f"slow {n % 5 + 1} 2" for n in range(12)]
    worker = Worker(encoder, threads=3)
    results = worker.run([["2 2"], images], str, decoder=HostileDecoder())
    next(results)

    def kill() -> None:
        for _ in range(2):
            server = process_server.start()._server
            while server.poll() is None and not psutil.Process(server.pid).children():
                time.sleep(0.01)
            server.kill()
            server.wait()  # by psutil its status would be lost

    killer = threading.Thread(target=kill)
    killer.start()
    (embedded,) = results
    killer.join()
    assert [result.error for result in embedded] == [None] * len(images)
    (expected,) = Worker(encoder, threads=3).run([images], HostileDecoder())
    assert [result.embedding.tobytes() for result in embedded] == [result.embedding.tobytes() for result in expected]


def test_lost_servers_count_apart_and_have_a_limit_too():
    attempts = Attempts()
    assert [attempts.count(has_lost_server=lost) for lost in (True, False, True, True)] == [True] * 4
    assert [attempts.count(has_lost_server=True) for _ in range(2)] == [True, False]
    assert [Attempts(failed=failed).count(has_lost_server=False) for failed in (0, 1)] == [True, False]


def test_a_server_that_is_killed_whenever_it_starts_ends_the_run(encoder, monkeypatch, tmp_path):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(process_server, "_server", None)
    monkeypatch.setattr(process_server.sys, "executable", str(killed))
    with pytest.raises(ProcessServerError, match="they or their server were killed 3 times; too little memory"):
        list(Worker(encoder).run([["2 2"]], str, decoder=HostileDecoder()))


def test_no_other_process_of_the_same_number_is_killed(image_processor):
    process = process_server.fork(DecodeProgram(HostileDecoder(), image_processor))
    process.kill()
    assert process.connection.poll(20)
    with pytest.raises(EOFError):
        process.connection.recv_bytes()
    other = subprocess.Popen(["sleep", "100"])
    process._pid = other.pid
    process.kill()
    process.close()
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.2)
    other.kill()
    other.wait()


def test_processes_are_the_first_to_end_where_memory_runs_out(processes):
    prepare(processes, "3 4")
    process = processes._idle[0]._process
    with open(f"/proc/{process._pid}/oom_score_adj") as file:
        assert file.read() == "1000\n"


@pytest.mark.parametrize(
    "timeout",
    [1e7, 1e12, float("inf"), 10**400],
    ids=lambda timeout: f"{timeout:.4}" if isinstance(timeout, float) else "huge",
)
def test_timeouts_of_any_size(image_processor, timeout):
    assert prepare(DecodeProcesses(HostileDecoder(), image_processor, timeout=timeout), "slow 3 4").grid == (1, 3, 4)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_timeouts_that_are_none(image_processor, timeout):
    with pytest.raises(ValueError, match="timeout: expected seconds > 0 or None"):
        DecodeProcesses(HostileDecoder(), image_processor, timeout=timeout)


def test_processes_end_with_their_owner(image_processor):
    processes = DecodeProcesses(HostileDecoder(), image_processor)
    before = set(psutil.Process().children(recursive=True))
    prepare(processes, "3 4")
    (child,) = set(psutil.Process().children(recursive=True)) - before
    del processes
    _, alive = psutil.wait_procs([child], timeout=60)
    assert alive == []


def test_processes_end_when_their_owner_is_killed(image_processor):
    """In the middle of a decoder too."""
    code = """
import pickle, sys, threading
from pipeline.hostile_decoder import HostileDecoder
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget
processes = DecodeProcesses(HostileDecoder(), pickle.load(sys.stdin.buffer), max_processes=2, timeout=None)
for _ in range(2):
    processes.submit("loop", MemoryBudget(1 << 30).reservation(), print)
threading.Event().wait()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    job = subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE)
    pickle.dump(image_processor, job.stdin)
    job.stdin.close()
    processes: list[psutil.Process] = []
    while len(processes) < 3:  # the server and both
        assert job.poll() is None
        time.sleep(0.05)
        processes = psutil.Process(job.pid).children(recursive=True)
    job.send_signal(signal.SIGKILL)
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []


def test_what_is_found_beside_the_pixels_comes_along(image_processor, encoder):
    decoder = HostileDecoder()
    assert prepare(DecodeProcesses(decoder, image_processor), "3 4").extras == {"extra": "3 4"}
    [[good, bad]] = Worker(encoder).run([["2 2", "damaged"]], str, decoder=decoder)
    assert (good.extras, bad.extras) == ({"extra": "2 2"}, None)


def test_server_imports_nothing_from_the_current_folder(image_processor, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process_server, "_server", None)
    assert prepare(DecodeProcesses(HostileDecoder(), image_processor), "3 4").grid == (1, 3, 4)


def answering(answers):
    """A process with these answers, whatever it is sent, and its end of the connection."""
    mine, theirs = Pipe()
    for answer in answers:
        theirs.send_bytes(answer)
    with socket.socket(fileno=os.dup(theirs.fileno())) as end:
        end.shutdown(socket.SHUT_WR)
    return Process(mine, os.getpid(), None, process_server.start()), theirs


@pytest.mark.parametrize(
    "answers",
    [
        [pickle.dumps({"bytes": 1})],
        [b'{"bytes": "many"}'],
        [b'{"bytes": 96}', b'{"shape": [1000000, 1000000], "grid": [1, 1, 1], "width": 4, "height": 4}'],
        [b'{"bytes": 96}', b'{"shape": [1, 24], "grid": [1, 1, 1], "width": 4, "height": 4}', b"short"],
        [b'{"bytes": 96}', b'{"shape": [1, 24], "grid": [1, 1, 2], "width": 4, "height": 4}', bytes(92)],
        [b'{"bytes": 96}', b'{"shape": [1, 24], "grid": [1, 1, 1], "width": "4", "height": 4}', bytes(92)],
        [b'{"bytes": 1}', b'{"shape": [1, 1], "grid": [1, 1, 1], "width": 4, "height": 4, "extras": [3]}', b"1234"],
        [b'{"bytes": 96}', b'{"shape": [1]}'],
        [b'{"bytes": -1}'],
        [b'{"reading": -1}'],
        [b"[]"],
    ],
)
def test_nonsense_from_a_process_is_a_crash(image_processor, monkeypatch, answers):
    """A decoder that was taken over can answer anything."""

    def fork(program):
        process, end = answering(answers)
        ends.append(end)
        return process

    ends = []
    monkeypatch.setattr(process_server, "fork", fork)
    with pytest.raises(ImageError, match="its decoder crashed"):
        prepare(DecodeProcesses(HostileDecoder(), image_processor), "3 4")
    assert len(ends) == 2


@pytest.mark.parametrize(
    "answers",
    [
        [b'{"answers": 3}'],
        [b'{"answers": []}'],
        [b'{"answers": [{"alone": true}]}'],
        [b'{"answers": [3, 4, 5]}'],
        [b'{"answers": ["error", "error", "alone"]}'],
        [b'{"answers": [%s]}' % b", ".join([b'{"jpeg": 4, "grid": [1, 1, 1], "width": 4, "height": 4}'] * 3)],
        [b'{"bytes": 1}'],
        [b'{"answers": [%s]}' % b", ".join([b'{"shape": [1, 48], "grid": [1, 1, 1], "width": 4, "height": 4}'] * 3)],
    ],
)
def test_files_of_a_batch_that_is_answered_with_nonsense_are_tried_alone(image_processor, monkeypatch, answers):
    fork, ends = process_server.fork, []

    def lie(program):
        process, end = answering(answers)
        ends.append(end)
        monkeypatch.setattr(process_server, "fork", fork)
        return process

    monkeypatch.setattr(process_server, "fork", lie)
    images = prepare_all(image_processor, ["3 4", "1 2", "2 2"])
    assert [image.grid for image in images] == [(1, 3, 4), (1, 1, 2), (1, 2, 2)]
    assert len(ends) == 1


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_a_batch_that_takes_too_long_is_tried_one_by_one(image_processor, monkeypatch, timeout):
    monkeypatch.setattr(decode_work, "_BATCH_SECONDS", 0.5)
    monkeypatch.setattr(HostileDecoder, "is_quick", lambda self, source: True)
    images = prepare_all(image_processor, ["slow 3 4", "slow 1 2", "slow 2 2"], timeout=timeout)
    assert [image.grid[1:] for image in images] == [(3, 4), (1, 2), (2, 2)]


def test_an_error_of_the_thread_that_serves_ends_the_files_in_hand_alone(image_processor, monkeypatch):
    budget, outcomes, done = MemoryBudget(1 << 30), [], threading.Semaphore(0)
    processes = DecodeProcesses(HostileDecoder(), image_processor)
    monkeypatch.setattr(processes, "_serve_once", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    processes.submit("slow 3 4", budget.reservation(), lambda outcome, _: (outcomes.append(outcome), done.release()))
    assert done.acquire(timeout=60)
    assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError]
    monkeypatch.undo()
    assert prepare(processes, "3 4").grid == (1, 3, 4)
    assert len(outcomes) == 1


def test_images_beyond_the_allowance_of_a_batch_are_decoded_alone(image_processor, monkeypatch):
    """In their order, and those behind them wait."""
    sizes = ["3 4", "40 40", "1 2", "30 30", "2 2"]
    need = image_processor.peak_bytes(*HostileDecoder().measure("40 40"))
    alone, prepare_one = [], DecodeChannel.prepare

    def prepare(self, data, *arguments):
        alone.append(data)
        return prepare_one(self, data, *arguments)

    monkeypatch.setattr(DecodeChannel, "prepare", prepare)
    images = prepare_all(image_processor, sizes * 4, memory=int(1.2 * need), processes=2)
    assert [image.grid[1:] for image in images] == [tuple(map(int, size.split())) for size in sizes * 4]
    assert {"40 40", "30 30"} <= {*alone}


def test_files_of_two_runs_are_in_no_batch():
    """Those of one that has ended are given up."""
    queue, budgets = DecodeQueue(), [MemoryBudget(100), MemoryBudget(100)]
    for budget in budgets:
        for _ in range(2):
            queue.append(Task("3 4", budget.reservation(), lambda *_: None, alone=False))
    batches = [queue.take(1) for _ in budgets]
    assert [[task.reservation.budget for task in batch] for batch in batches] == [[budget] * 2 for budget in budgets]
    assert not len(queue)


def test_the_first_batches_of_each_process_are_small():
    """The encoder waits for the first images, and a process answers for a batch at once."""
    queue, budget = DecodeQueue(), MemoryBudget(100)
    for _ in range(100):
        queue.append(Task("3 4", budget.reservation(), lambda *_: None, alone=False))
    assert [len(queue.take(3)) for _ in range(9)] == [2, 2, 2, 4, 4, 4, 8, 8, 8]
    assert [len(queue.take(3)) for _ in range(1000) if len(queue)][:6] == [8, 8, 8, 8, 8, 6]


def test_one_file_of_a_batch_costs_the_others_nothing(image_processor):
    hostile = ["3 4", "loop", "1 2", "crash", "2 2", "allocate", "1 1", "damaged"]
    outcomes = prepare_all(image_processor, hostile, timeout=2)
    assert [isinstance(outcome, ImageError) for outcome in outcomes] == [False, True] * 4


def test_a_server_that_cannot_start_ends_the_run(encoder, monkeypatch):
    monkeypatch.setattr(process_server, "_server", None)
    monkeypatch.setattr(process_server.sys, "executable", "/bin/false")
    with pytest.raises(ProcessServerError, match="cannot be started"):
        list(Worker(encoder).run([["2 2"]], str, decoder=HostileDecoder()))


# Memory


def test_a_large_file_is_not_read_before_there_is_memory(processes):
    """The decoder would loop."""
    with pytest.raises(ImageError, match="takes about 134 MB of memory, expected at most 100; set decode_memory"):
        processes.prepare(f"of {1 << 27} bytes", MemoryBudget(100_000_000).reservation())


def test_of_large_files_one_is_read_at_a_time():
    budget = MemoryBudget(100)
    first, second = budget.reservation(), budget.reservation()
    notified = []
    first.hold(60)
    assert not second.try_hold(30, lambda: notified.append("read"))
    first.reserve(90)  # with the file, which is no longer counted by itself
    assert (budget.used, budget.decoding, notified) == (90, 1, ["read"])
    assert not second.try_hold(30, lambda: notified.append("decoded"))
    first.finish_decoding(40)
    assert notified == ["read", "decoded"]
    assert second.try_hold(30, notified.clear)
    assert budget.used == 70
    second.finish_decoding(0)  # damaged
    first.release()
    assert (budget.used, budget.decoding, budget.next_ticket) == (0, 0, 2)


def test_a_batch_reserves_for_all_of_its_images_or_for_none():
    budget = MemoryBudget(100)
    large, *batch = (budget.reservation() for _ in range(4))
    notified = []
    assert not budget.try_reserve_all(batch, 10, lambda: notified.append("next"))  # the large one is before them
    large.reserve(80)
    assert notified == ["next"]
    assert not budget.try_reserve_all(batch, 10, lambda: notified.append("decoded"))
    assert (budget.used, budget.decoding) == (80, 1)
    large.finish_decoding(60)
    assert notified == ["next", "decoded"]
    assert budget.try_reserve_all(batch, 10, notified.clear)
    assert (budget.used, budget.decoding, budget.next_ticket) == (90, 3, 4)
    batch[1].renounce()  # it needs more, and is granted that before all others that are not granted yet
    last = budget.reservation()
    assert (budget.used, budget.decoding, budget.next_ticket) == (80, 2, 2)
    assert not last.try_reserve(1, notified.clear)
    assert not batch[1].try_reserve(30, notified.clear)
    batch[0].finish_decoding(0)
    batch[2].finish_decoding(0)
    assert batch[1].try_reserve(30, notified.clear)
    assert last.try_reserve(1, notified.clear)


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
    threads[2].join(60)
    assert order == ["first"]  # the large one does not fit beside it, and nothing overtakes
    first.finish_decoding(50)  # decoded, but not yet in a pack: the large one is let in, or nothing would go on
    threads[1].join(60)
    assert order == ["first", "large"]
    large.finish_decoding(5)
    threads[0].join(60)
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

"""When the process began, starting a GPU ahead of its use, and the threads beside it."""

import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from nopad.environment import SWITCH_SECONDS, process_start, quick_switches, start_cuda


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        (None, True, ["cuda"]),
        ("cuda:1", True, ["cuda:1"]),
        (None, False, []),
        ("cpu", True, []),
        ("nonsense", True, []),
    ],
)
def test_a_gpu_is_started_where_it_is_going_to_be_used(device, available, expected, monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch, "empty", lambda size, device: started.append(device))
    start_cuda(device).join()
    assert started == expected


def test_a_gpu_that_does_not_start_raises_where_it_is_used(monkeypatch):
    def fail(size, device):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", fail)
    start_cuda().join()  # a thread that ends by an error is an error of the test session


def test_the_start_of_the_process_is_that_of_the_system():
    age = time.time() - psutil.Process().create_time()
    assert time.perf_counter() - process_start() == pytest.approx(age, abs=1.0)


def test_threads_switch_quickly_for_a_while():
    before = sys.getswitchinterval()
    with suppress(ValueError), quick_switches():
        during = sys.getswitchinterval()
        raise ValueError
    assert (during, sys.getswitchinterval()) == (pytest.approx(SWITCH_SECONDS), before)


def test_the_last_of_several_jobs_ends_quick_switches():
    before = sys.getswitchinterval()
    first, second = quick_switches(), quick_switches()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before

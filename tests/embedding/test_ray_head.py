"""Connecting to Ray."""

import sys
import threading
from types import SimpleNamespace

from nopad.embedding.actors.ray_head import connected


def test_the_thread_that_starts_ray_lives_as_long(monkeypatch):
    """The system ends Ray's processes with the thread that has started them; calls then waited for a minute."""
    threads, when_shut_down = [], []
    ray = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address, **options: threads.append(threading.current_thread()),
        get_runtime_context=lambda: SimpleNamespace(gcs_address="localhost:6379"),
        shutdown=lambda: when_shut_down.append(threads[0].is_alive()),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    with connected("local", threading.Event()):
        assert threads[0].is_alive()
    threads[0].join(60)
    assert when_shut_down == [True]
    assert not threads[0].is_alive()

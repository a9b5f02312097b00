import os
import selectors
import threading
from unittest.mock import Mock

import pytest

from nopad.pipeline.wakeable_selector import WakeableSelector


def test_wake_from_another_thread_ends_a_select_without_a_timeout():
    selector = WakeableSelector()
    ended = threading.Event()

    def select() -> None:
        assert selector.select(None) == []
        ended.set()

    thread = threading.Thread(target=select, daemon=True)
    thread.start()
    selector.wake()
    assert ended.wait(60)
    assert selector.select(0) == []  # the wake-up is used up


def test_wakes_add_up_to_one_and_do_not_block():
    selector = WakeableSelector()
    for _ in range(1 << 17):  # more than a pipe holds
        selector.wake()
    for _ in range(1 << 5):
        assert selector.select(0) == []


def test_data_of_what_is_ready():
    selector = WakeableSelector()
    reading, writing = os.pipe()
    selector.register(reading, selectors.EVENT_READ, "data")
    assert selector.select(0) == []
    os.write(writing, b"x")
    selector.wake()
    assert selector.select(None) == ["data"]
    selector.unregister(reading)
    assert selector.select(0) == []
    os.close(reading)
    os.close(writing)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["os.pipe", "selectors.DefaultSelector"])
def test_without_a_free_descriptor_nothing_else_is_raised(monkeypatch, what):
    monkeypatch.setattr(what, Mock(side_effect=OSError(24, "Too many open files")))
    with pytest.raises(OSError, match="Too many open files"):
        WakeableSelector()

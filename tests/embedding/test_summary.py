"""What a run was limited by."""

from __future__ import annotations

import pytest

from nopad.embedding.summary import Summary
from nopad.pipeline.stats import Stats


def summary(decode: float, encode: float, write: float, *, done: int = 10, encoders: int = 1) -> Summary:
    stats = Stats(images=done, decode_seconds=decode, device_seconds=encode)
    counts = {"rows": done, "failed": 0, "missing": 0, "to_go": 0, "done": done}
    lists: dict = {"left_out": {}, "changes": [], "shards_with_failures": []}
    where: dict = {"device": "GPU", "encoders": encoders, "decode_processes": 4 * encoders}
    return Summary(folder="t", seconds=10.0, stats=stats, write_seconds=write, **counts, **where, **lists)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ((38.0, 4.0, 1.0), "limited by decoding: 4 decode processes 95% busy, GPU 40%, writing 10%"),
        ((8.0, 9.0, 1.0), "limited by the encoder: 4 decode processes 20% busy, GPU 90%, writing 10%"),
        ((8.0, 4.0, 7.0), "limited by writing: 4 decode processes 20% busy, GPU 40%, writing 70%"),
        ((4.0, 4.0, 1.0), "limited by starting, listing and reading: 4 decode processes 10% busy, GPU 40%"),
    ],
)
def test_the_limit_is_the_busiest_stage(seconds, words):
    assert str(summary(*seconds).limit).startswith(words)


def test_several_encoders_are_busy_on_average():
    several = summary(38.0, 10.0, 2.0, encoders=2)
    assert several.limit == "limited by the encoder: 8 decode processes 48% busy, 2 GPUs 50%, writing 10%"


def test_a_run_with_nothing_to_do_has_no_limit():
    nothing = summary(0.0, 0.0, 0.0, done=0).to_dict()
    assert (nothing["limit"], nothing["busy"]) == (None, None)

"""`nopad plan`."""

import json
import sys
import time
from dataclasses import replace

import pytest
from jobs import embed
from pictures import write_photos

from nopad import cli
from nopad.cli import main
from nopad.embedding import sampling
from nopad.embedding.actors.node_samples import NodeSample
from nopad.embedding.plan import Plan, plan
from nopad.embedding.plan_command import describe, size
from nopad.embedding.sampling import sample_places
from nopad.embedding.settings import Settings
from nopad.embedding.summary import Summary
from nopad.pipeline.stats import Stats


@pytest.fixture(scope="module")
def model(goldens):
    return str(goldens / "aimv2-apple-native")


@pytest.fixture
def photos(tmp_path):
    photos = write_photos(tmp_path / "photos", 40)
    (photos / "broken.jpg").write_bytes(b"no photo")
    return photos


@pytest.mark.parametrize("tokens", [False, True])
def test_a_plan_of_all_inputs_is_what_the_job_does(photos, tmp_path, model, tokens):
    settings = Settings(model=model, shard_size=5, tokens=tokens)
    planned = plan([str(photos)], settings, sample=100, out=str(tmp_path / "not" / "there"))
    summary = embed(photos, tmp_path / "out", model, tokens=tokens)
    assert (planned.inputs, planned.sample, planned.shards) == (41, 41, 9)
    assert sum(planned.failures.values()) == summary.failed > 0
    assert planned.patches == pytest.approx(summary.stats.patches / (41 - summary.failed))
    assert planned.stores_tokens == tokens
    assert planned.token_bytes == summary.stats.patches * 64 * 2
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert planned.table_bytes == pytest.approx(written, rel=0.05)
    assert planned.seconds * planned.per_second == pytest.approx(41)
    assert planned.cores_per_encoder == pytest.approx(planned.decode_core_seconds * planned.encoder_per_second)
    assert planned.free_bytes > 0
    assert not (tmp_path / "not").exists()


def test_a_sample_stands_for_all(photos, model):
    planned = plan([str(photos)] * 5, Settings(model=model), sample=16)
    assert (planned.inputs, planned.sample) == (205, 16)
    assert planned.seconds * planned.per_second == pytest.approx(205)


def test_a_sample_of_which_nothing_is_embedded(tmp_path, model):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    planned = plan([str(tmp_path)], Settings(model=model))
    assert (planned.encoder_per_second, planned.cores_per_encoder) == (0.0, 0.0)
    assert planned.warnings == ["100.0% of the sample would be failed rows: see the reasons"]
    text = describe(planned)
    assert "encoder: its speed is not known, since nothing of the sample was embedded\n" in text
    assert "in 1 file of up to 1 row;" in text


def test_sample_places():
    assert sample_places(5, 16) == [0, 1, 2, 3, 4]
    assert sample_places(1000, 16) == [*range(8), *range(500, 508)]
    assert len(sample_places(100, 99)) <= 99


def summary_of(seconds: float, **stats: float) -> Summary:
    counts = {"rows": 100, "failed": 0, "missing": 0, "to_go": 0, "done": 100, "write_seconds": 0.0, "device": "CPU"}
    more = {"encoders": 1, "decode_processes": 2, "left_out": {}, "changes": [], "shards_with_failures": []}
    return Summary(folder="f", seconds=seconds, stats=Stats(images=100, **stats), **counts, **more)


def test_rate_is_that_of_the_stage_that_works_longest():
    """Four seconds until the processes run, then all is decoded in six by two of them, the last while one drains."""
    times = [(5.0, 10), (7.0, 20), (10.0, 100)]
    assert sampling.rate(summary_of(10.0, decode_seconds=12.0, device_seconds=2.0), times) == pytest.approx(100 / 6)
    assert sampling.rate(summary_of(10.0, decode_seconds=12.0, device_seconds=8.0), times) == pytest.approx(100 / 8)


def test_rate_of_a_pipeline_that_waits_for_reads():
    times = [(2.0, 20), (10.0, 100)]
    assert sampling.rate(summary_of(10.0, decode_seconds=1.0, device_seconds=2.0), times) == pytest.approx(80 / 8)
    assert sampling.rate(summary_of(10.0, decode_seconds=1.0), [(10.0, 100)]) == pytest.approx(100 / 10)


def test_a_sample_of_no_number_takes_as_many_as_give_a_speed(photos, model, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE", 8)
    monkeypatch.setattr(sampling, "MIN_SECONDS", 1e9)
    planned = plan([str(photos)], Settings(model=model))
    assert planned.sample == 41
    assert sum(planned.failures.values()) < 41
    assert planned.patches * (41 - sum(planned.failures.values())) * 64 * 2 == planned.token_bytes
    monkeypatch.setattr(sampling, "MIN_SECONDS", 0.0)
    assert plan([str(photos)], Settings(model=model)).sample == 8


def test_command(photos, model, capsys, tmp_path):
    arguments = ["plan", str(photos), "--model", model, "--device", "cpu", "--sample", "8", "--out", str(tmp_path)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "41 inputs, listed in" in output
    assert "of a sample of 8" in output
    assert main([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {"inputs", "seconds", "limit", "cores_per_encoder", "table_bytes", "warnings"} <= planned.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
    assert main(["plan", str(photos), "--model", model, "--sample", "0"]) == 2
    assert main(["plan", str(photos), "--model", model, "--out", "https://host/table"]) == 2
    assert "--out: expected a folder or an address that begins with s3://" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--actors", "2"])


def test_the_start_of_a_command_counts(photos, model, capsys, monkeypatch):
    arguments = ["plan", str(photos), "--model", model, "--device", "cpu", "--sample", "8", "--json"]
    monkeypatch.setattr(cli, "process_start", lambda: time.perf_counter() - 1e6)
    assert main(arguments) == 0  # called by a process that has done other things
    assert json.loads(capsys.readouterr().out)["total_seconds"] < 1e6
    monkeypatch.setattr(sys, "argv", ["nopad", *arguments])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["total_seconds"] > 1e6


def test_the_start_of_decode_processes_counts_once(photos, model, monkeypatch):
    """By the first of two samples: the second finds them."""
    monkeypatch.setattr(sampling, "SAMPLE", 8)
    monkeypatch.setattr(sampling, "MIN_SECONDS", 1e9)
    samples = []

    def embedded(*arguments):
        sample = real(*arguments)
        later = {0: 1e6, 1: 0.0}[len(samples)]
        samples.append(replace(sample, summary=replace(sample.summary, seconds=sample.summary.seconds + later)))
        return samples[-1]

    real = sampling._embedded
    monkeypatch.setattr(sampling, "_embedded", embedded)
    assert plan([str(photos)], Settings(model=model)).start_seconds > 9e5
    assert len(samples) == 2


PLAN = Plan(
    inputs=5_000_000_000,
    sample=512,
    failures={"cannot be read": 20, "truncated": 1},
    listing_seconds=3600.0,
    start_seconds=5.0,
    seconds=1e7,
    per_second=500.0,
    encoder_per_second=1500.0,
    decode_core_seconds=0.01,
    cores=8,
    gpus=0,
    cores_per_encoder=15.0,
    limit="limited by decoding",
    patches=256.0,
    shard_rows=2048,
    shards=2_441_407,
    vector_bytes=15 * 10**12,
    token_bytes=26 * 10**14,
    stores_tokens=False,
    free_bytes=2 * 10**12,
    too_many_files="2,441,407 files in one folder",
)


def test_warnings_and_the_text():
    assert PLAN.warnings == [
        "4.1% of the sample would be failed rows: see the reasons",
        "2,441,407 files in one folder",
        "the table is larger than the free space on its disk",
        "decoding needs 15 cores for each encoder, this machine has 8",
    ]
    text = describe(PLAN)
    assert "15.0 TB of vectors in 2,441,407 files of up to 2,048 rows; --tokens adds 2.6 PB; 2.0 TB are free" in text
    assert "  20 × cannot be read" in text
    assert "time: 116 days with one encoder" in text
    assert replace(PLAN, stores_tokens=True).table_bytes == 15 * 10**12 + 26 * 10**14
    nodes = (
        NodeSample(node="1", host="a", cores=16, gpus=1, unreadable={}),
        NodeSample(node="2", host="b", cores=16, gpus=2, unreadable={"no such folder": 9}),
        NodeSample(node="3", host="c", cores=0, gpus=0, unreadable={}, problem="it is gone"),
    )
    planned = replace(PLAN, nodes=nodes)
    assert planned.warnings[-3:] == [
        "decoding needs 15 cores for each encoder, b has 16 for 2 GPUs",
        "b cannot read 9 of the sample of 512: no such folder",
        "c has not read the sample: it is gone",
    ]
    assert "a: 16 cores, 1 GPU; reads the whole sample\nb: 16 cores, 2 GPUs; cannot read 9 of the" in describe(planned)
    assert [size(number) for number in (5, 4600, 10**18)] == ["5 B", "4.6 kB", "1,000.0 PB"]

"""How the encoder of a job runs: compiled or not, in which packs and dtype."""

import numpy as np
import pytest
import torch
from jobs import embed, table

import nopad
from nopad.embedding import workers
from nopad.embedding.settings import Settings
from nopad.embedding.table import reader as stored
from nopad.encoder import PackedEncoder


@pytest.fixture
def compiled_capacities(monkeypatch) -> list[int]:
    """The capacities that encoders are compiled for; without a compiler, and of at most 1100 tokens."""
    capacities = []

    def compile(self, capacity=None, max_segments=None):
        capacities.append(capacity)
        if capacity > 1100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, capacity, max_segments, compiled=False)

    real = PackedEncoder.compile
    monkeypatch.setattr(PackedEncoder, "compile", compile)
    return capacities


@pytest.mark.parametrize("capacity", [None, 4200])
def test_capacity_that_does_not_fit_is_halved_and_stays_halved(
    photos, tmp_path, model, compiled_capacities, stop_after, capacity, caplog
):
    options = {"compile": True, "capacity": capacity}
    embed(photos, tmp_path / "out", model, **options, **stop_after(1))
    asked = capacity or 2048
    tried = [asked >> power for power in range(3) if power == 0 or asked >> (power - 1) > 1100]
    assert compiled_capacities == tried
    assert f"packs of {asked:,} tokens do not fit into the memory of cpu (CUDA out of memory); trying" in caplog.text
    assert stored.read_metadata(next((tmp_path / "out").glob("*.parquet")))["capacity"] == str(tried[-1])
    assert embed(photos, tmp_path / "out", model, **options).done == 7
    assert compiled_capacities == [*tried, tried[-1]]  # not tried again: there may be more memory now
    embed(photos, tmp_path / "whole", model, compile=True, capacity=tried[-1])
    assert [*table(tmp_path / "out").values()] == [*table(tmp_path / "whole").values()]


def test_resumed_job_does_not_halve_its_capacity(photos, tmp_path, model, compiled_capacities, stop_after):
    embed(photos, tmp_path / "out", model, compile=True, capacity=1050, **stop_after(1))
    record = tmp_path / "out" / ".nopad" / "job.json"
    record.write_text(record.read_text().replace('"1050"', '"2100"'))
    with pytest.raises(ValueError, match="capacity: packs of 2,100 tokens do not fit"):
        embed(photos, tmp_path / "out", model, compile=True, capacity=2100)


def test_compiled_or_not_is_another_job(photos, tmp_path, model, compiled_capacities):
    embed(photos, tmp_path / "out", model, compile=True, capacity=1024)
    metadata = nopad.read_features(tmp_path / "out").metadata
    assert {key: metadata[key] for key in ("compile", "capacity", "max_segments", "precision", "dtype")} == {
        "compile": "yes",
        "capacity": "1024",
        "max_segments": "64",
        "precision": "",
        "dtype": "float32",
    }
    with pytest.raises(ValueError, match="compile: yes there, no now"):
        embed(photos, tmp_path / "out", model, capacity=1024, compile=False)


def test_large_jobs_compile_on_a_cpu_and_stay_as_they_were_begun(photos, tmp_path, model, monkeypatch, stop_after):
    monkeypatch.setattr("nopad.inference.compile.MIN_INPUTS_ON_CPU", 12)
    embed(photos, tmp_path / "whole", model)
    assert nopad.read_features(tmp_path / "whole").metadata["execution"].startswith("fused by")
    embed(photos, tmp_path / "out", model, **stop_after(1))
    monkeypatch.setattr("nopad.inference.compile.MIN_INPUTS_ON_CPU", 13)
    assert embed(photos, tmp_path / "out", model).done == 7
    assert [*table(tmp_path / "out").values()] == [*table(tmp_path / "whole").values()]
    embed(photos, tmp_path / "eager", model)
    assert nopad.read_features(tmp_path / "eager").metadata["execution"] == "eager"
    eager, compiled = (nopad.read_features(tmp_path / name).embeddings for name in ("eager", "whole"))
    np.testing.assert_allclose(compiled, eager, atol=1e-5)


def test_features_in_fp8_are_those_of_an_encoder_in_fp8(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model, precision="fp8")
    expected = nopad.load(model, precision="fp8").embed(sorted(photos.iterdir())[:5])
    np.testing.assert_array_equal(nopad.read_features(tmp_path / "out").embeddings[:5], expected.numpy())
    assert nopad.read_features(tmp_path / "out").metadata["precision"] == "fp8"


def test_dtype_is_that_of_the_device_not_of_the_checkpoint(photos, tmp_path, model):
    half = tmp_path / "half"
    nopad.load(model, dtype=torch.bfloat16).save_pretrained(half)
    assert nopad.load(half).dtype == torch.bfloat16
    embed(photos, tmp_path / "out", half)
    assert nopad.read_features(tmp_path / "out").metadata["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["import", "engines", "load"]),
        ({"compile": False}, ["engines", "load"]),
        ({"layers": (0,)}, ["engines", "load"]),
        ({"decode": "gpu"}, ["import", "engines", "load"]),
        ({"decode": "cpu"}, ["import", "load"]),
        ({"decode": "scaled"}, ["import", "load"]),
        ({"resize": "pil"}, ["import", "load"]),
    ],
    ids=["compiled", "not compiled", "single layers", "GPU decodes", "CPU decodes", "scaled", "as Pillow"],
)
def test_what_a_gpu_needs_is_begun_while_weights_are_read(monkeypatch, model, options, expected):
    steps = []
    monkeypatch.setattr(workers, "start_imports", lambda device: steps.append("import"))
    monkeypatch.setattr(workers, "start_engines", lambda device: steps.append("engines"))
    monkeypatch.setattr(workers, "load", lambda *arguments, **options: steps.append("load"))
    workers.load_encoder(Settings(model=str(model), device="cpu", **options))
    assert steps == expected

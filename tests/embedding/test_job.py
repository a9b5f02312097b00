import errno
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path

import duckdb
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from pictures import write_photos, write_video
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import tiny

import nopad
from nopad.checkpoints.files import open_checkpoint
from nopad.embedding import api, job, manifest, workers
from nopad.embedding import rows as table_rows
from nopad.embedding.inputs import listing as inputs
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input
from nopad.embedding.lock import LostLockError
from nopad.embedding.progress import Progress
from nopad.embedding.summary import Summary
from nopad.embedding.table import reader as stored
from nopad.embedding.table import writer as shards
from nopad.encoder import PackedEncoder
from nopad.pipeline.worker import Worker
from nopad.preprocessing.video import read_frames


def embed(sources, out: Path, model, **options) -> Summary:
    return nopad.embed(sources, out, model=model, **{"shard_size": 5, "workers": 2, **options})


def table(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the shards."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def rows(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def errors(folder: Path) -> dict[str, str]:
    return {row["id"]: row["error"] for row in rows(folder) if row["status"] == "failed"}


@pytest.fixture
def stop_after(monkeypatch) -> Callable[[int], dict]:
    """Gives options that stop a run once it has so many shards; these are written, and no other is begun."""

    def options(number: int) -> dict:
        stop = threading.Event()
        shards = count(1)

        def run(self, *arguments, **options):
            for results in real(self, *arguments, **options):
                if next(shards) == number:
                    stop.set()
                yield results

        monkeypatch.setattr(Worker, "run", run)
        return {"stop": stop}

    real = Worker.run
    return options


# The table


def test_one_row_per_input_in_order_and_all_that_is_to_be_known_in_the_schema(photos, tmp_path, model):
    (photos / "005.png").write_bytes(b"")
    (photos / "notes.md").touch()
    summary = embed(photos, tmp_path / "out", model)
    written = rows(tmp_path / "out")
    assert [row["id"] for row in written] == [f"{n:03}.png" for n in range(12)]
    assert {row["source"] for row in written} == {str(photos)}
    assert [row["status"] for row in written] == ["failed" if n == 5 else "ok" for n in range(12)]
    assert written[5] == {
        **dict.fromkeys(written[5]),
        "id": "005.png",
        "source": str(photos),
        "status": "failed",
        "error": "empty: 0 bytes",
    }
    with Image.open(photos / "003.png") as image:
        width, height = image.size
    assert (written[3]["width"], written[3]["height"]) == (width, height)
    assert (written[3]["grid_t"], written[3]["grid_h"], written[3]["grid_w"]) == (1, height // 4, width // 4)

    encoder = nopad.load(model)
    for path in (tmp_path / "out").glob("*.parquet"):
        metadata = stored.read_metadata(path)
        expected = {
            "model": str(model),
            "revision": "",
            "family": "aimv2",
            "weights": manifest.weights_digest(encoder),
            "preprocessing": encoder.preprocessing.with_size(max_patches=4096).describe(),
            "dtype": "float32",
            "version": nopad.__version__,
        }
        assert {key: metadata[key] for key in expected} == expected

    assert (summary.rows, summary.failed, summary.missing, summary.to_go, summary.done) == (12, 1, 0, 0, 12)
    assert summary.left_out == {".md": 1}
    assert summary.changes == []
    assert (summary.stats.images, summary.stats.failed, summary.stats.fill) == (12, 1, 1.0)
    assert summary.stats.patches == sum(row["grid_h"] * row["grid_w"] for row in written if row["status"] == "ok")
    assert summary.shards_with_failures == [sorted(table(tmp_path / "out"))[1]]
    told = summary.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["per_second"]["images"] == pytest.approx(12 / summary.seconds)
    assert told["fill"] == 1.0


def test_other_programs_read_it_as_it_is(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    features = nopad.read_features(tmp_path / "out")
    matrix = features.embeddings
    assert (matrix.shape, matrix.dtype, features.tokens) == ((12, 32), np.float32, None)
    frame = pandas.read_parquet(tmp_path / "out")
    assert frame["id"].tolist() == features.ids
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), matrix)
    np.testing.assert_array_equal(np.array(pq.read_table(tmp_path / "out")["embedding"].to_pylist()), matrix)
    found = duckdb.connect().execute(f"select embedding from '{tmp_path}/out/*.parquet' order by id").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in found]), matrix)


def test_features_are_those_of_encoder_embed_bit_for_bit(photos, tmp_path, model):
    encoder = nopad.load(model)
    paths = sorted(photos.iterdir())
    summary = embed(photos, tmp_path / "one", encoder, shard_size=None, capacity=64)
    vectors = encoder.embed(paths, capacity=64)
    np.testing.assert_array_equal(nopad.read_features(tmp_path / "one").embeddings, vectors.numpy())
    assert summary.stats.packs > 3

    embed(photos, tmp_path / "more", encoder, capacity=64)
    expected = torch.cat([encoder.embed(paths[start : start + 5], capacity=64) for start in (0, 5, 10)])
    np.testing.assert_array_equal(nopad.read_features(tmp_path / "more").embeddings, expected.numpy())


def test_tokens_are_those_of_the_encoder(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model, tokens=True)
    features = nopad.read_features(tmp_path / "out")
    encoder = nopad.load(model)
    for number, path in enumerate(sorted(photos.iterdir())):
        pack = encoder.pack([path])
        with torch.inference_mode():
            tokens = encoder(pack)
        expected = tokens.reshape(*pack.grid_thw[0].tolist(), 32)
        assert features.tokens[number].dtype == np.float16
        np.testing.assert_allclose(features.tokens[number], expected, atol=2e-3, rtol=2e-3)


def test_neither_workers_nor_an_encoder_object_change_a_byte(photos, tmp_path, model):
    embed(photos, tmp_path / "1", model, workers=1, capacity=64)
    embed(photos, tmp_path / "8", nopad.load(model), workers=8, capacity=64)
    assert table(tmp_path / "1") == table(tmp_path / "8")
    assert len(table(tmp_path / "1")) == 3


def test_layers_in_fp8_are_another_job_of_the_same_weights(photos, tmp_path, model):
    plain, encoder, again = nopad.load(model), nopad.load(model, precision="fp8"), nopad.load(model, precision="fp8")
    embed(photos, tmp_path / "plain", plain)
    embed(photos, tmp_path / "fp8", encoder, capacity=64)
    assert embed(photos, tmp_path / "fp8", again, capacity=64).done == 0
    assert not {*table(tmp_path / "plain")} & {*table(tmp_path / "fp8")}
    vectors = encoder.embed(sorted(photos.iterdir()), capacity=64)
    np.testing.assert_allclose(nopad.read_features(tmp_path / "fp8").embeddings, vectors.numpy(), rtol=0.05, atol=0.05)
    with pytest.raises(ValueError, match="precision: none there, fp8 now"):
        embed(photos, tmp_path / "plain", encoder)


@pytest.mark.parametrize("part", ["norm.weight", "layers.0.mlp.down.weight", "layers.0.mlp.down.scale"])
def test_the_digest_of_fp8_covers_parameters_and_buffers(model, part):
    encoder = nopad.load(model, precision="fp8")
    before = manifest.weights_digest(encoder)
    path, _, name = part.rpartition(".")
    values = getattr(encoder.get_submodule(path), name)
    with torch.no_grad():
        values.view(torch.uint8)[0] ^= 1
    assert manifest.weights_digest(encoder) != before


def test_the_digest_of_what_can_be_saved_stays(goldens):
    digest = manifest.weights_digest(nopad.load(goldens / "aimv2-apple-native"))
    assert digest == "ad2bcb369a26bf4ad52ae4843a152afbbe9d4c27f6376b2ee30c47faec4f59d4"


def test_large_picture_of_a_rule_without_limit_is_capped(tmp_path, model, clip_model):
    Image.effect_noise((300, 240), 50).convert("RGB").save(tmp_path / "large.png")  # 75 × 60 patches of 4 pixels
    for name, options, recorded, grid in (
        ("auto", {}, "4096", (1, 57, 71)),
        ("fewer", {"max_patches": 100}, "100", (1, 8, 11)),
        ("none", {"max_patches": None}, "", (1, 60, 75)),
    ):
        embed(tmp_path / "large.png", tmp_path / name, model, **options)
        features = nopad.read_features(tmp_path / name)
        assert tuple(features.grids[0]) == grid
        assert features.metadata["max_patches"] == recorded
        assert (" at most " in features.metadata["preprocessing"]) == bool(recorded)
    encoder = nopad.load(model)
    capped, whole = (nopad.read_features(tmp_path / name).embeddings for name in ("auto", "none"))
    np.testing.assert_array_equal(encoder.embed([tmp_path / "large.png"]), capped)
    np.testing.assert_array_equal(encoder.embed([tmp_path / "large.png"], max_patches=None), whole)
    assert len(encoder.pack([tmp_path / "large.png"]).hidden_states) == 60 * 75

    embed(tmp_path / "large.png", tmp_path / "crop", clip_model)  # its rule has a size, and needs no cap
    assert nopad.read_features(tmp_path / "crop").metadata["max_patches"] == ""


def test_stored_as_float16_and_as_plain_lists(photos, tmp_path, model):
    embed(photos, tmp_path / "wide", model)
    embed(photos, tmp_path / "out", model, embedding_dtype="float16", embedding_list="variable")
    type = pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).field("embedding").type
    assert str(type) == "list<element: halffloat>"
    wide, half = (nopad.read_features(tmp_path / name).embeddings for name in ("wide", "out"))
    np.testing.assert_array_equal(half, wide.astype(np.float16))


def test_what_the_table_cannot_hold_is_a_failure(photos, tmp_path, monkeypatch, model):
    changed = shutil.copytree(model, tmp_path / "model")
    weights = load_file(changed / "model.safetensors")
    weights["rms_norm.weight"] *= 1e6
    save_file(weights, changed / "model.safetensors")
    embed(photos, tmp_path / "half", changed, embedding_dtype="float16")
    assert len(errors(tmp_path / "half")) == 12
    reason = errors(tmp_path / "half")["000.png"]
    assert reason.startswith("its embedding goes up to ")
    assert reason.endswith(", which float16 cannot hold; store it as float32")

    monkeypatch.setattr(table_rows, "MAX_TOKEN_BYTES", 10 * 32 * 2)
    embed(photos, tmp_path / "tokens", model, tokens=True)
    sizes = {row["id"]: (row["height"] or 0) // 4 * ((row["width"] or 0) // 4) for row in rows(tmp_path / "tokens")}
    assert max(sizes.values()) <= 10
    assert 0 < len(errors(tmp_path / "tokens")) < 12
    assert "bytes, a table takes 640; set max_patches" in next(iter(errors(tmp_path / "tokens").values()))


def test_a_list_with_duplicates_has_a_row_for_each(photos, tmp_path, model):
    (tmp_path / "list.txt").write_text("photos/001.png\nphotos/000.png\nphotos/001.png\n")
    embed([tmp_path / "list.txt", photos], tmp_path / "out", model)
    written = rows(tmp_path / "out")
    assert [row["id"] for row in written[:4]] == ["photos/001.png", "photos/000.png", "photos/001.png", "000.png"]
    assert written[0]["embedding"] == written[2]["embedding"]
    assert len(written) == 15


def test_videos(tmp_path, model, clip_model):
    (tmp_path / "videos").mkdir()
    path = write_video(tmp_path / "videos" / "a.mp4", 9)
    (tmp_path / "videos" / "b.mp4").write_bytes(path.read_bytes()[:300])
    frames = read_frames(path, 4)
    for checkpoint, grid in ((model, (4, 8, 16)), (clip_model, (4, 7, 7))):
        out = tmp_path / checkpoint.name
        embed(tmp_path / "videos", out, checkpoint, frames=4, tokens=True)
        features = nopad.read_features(out)
        assert features.ids == ["a.mp4"]
        assert [failure.id for failure in features.failures] == ["b.mp4"]
        assert tuple(features.grids[0]) == grid
        assert features.tokens[0].shape == (*grid, features.embeddings.shape[1])
        encoder = nopad.load(checkpoint)
        np.testing.assert_array_equal(features.embeddings, encoder.embed([frames]).numpy())
        one_by_one = encoder.embed(list(frames)).mean(0).numpy()
        assert np.allclose(features.embeddings[0], one_by_one, atol=1e-5) == (checkpoint == model)


# How the encoder runs


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
        embed(photos, tmp_path / "out", model, capacity=1024)


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


# Going on


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_stopped_job_goes_on_to_what_an_uninterrupted_one_gives(photos, tmp_path, model, number, tokens, stop_after):
    (photos / "007.png").write_bytes(b"no picture")
    options = {"tokens": tokens, "capacity": 64}
    embed(photos, tmp_path / "whole", model, **options)
    summary = embed(photos, tmp_path / "out", model, **options, **stop_after(number))
    assert (summary.rows, summary.missing, summary.to_go) == (5 * number, 12 - 5 * number, 12 - 5 * number)
    assert len(table(tmp_path / "out")) == number
    with pytest.raises(ValueError, match=f"unfinished: {3 - number} of 3 shards (is|are) missing"):
        nopad.read_features(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    summary = embed(photos, tmp_path / "out", model, **options)
    assert (summary.rows, summary.done, summary.to_go, summary.failed) == (12, 12 - 5 * number, 0, 1)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture
def threads_of_packs(monkeypatch) -> list[int]:
    """With how many threads each pack was computed."""
    seen = []

    def encode(self, *arguments, **options):
        seen.append(torch.get_num_threads())
        return real(self, *arguments, **options)

    real = PackedEncoder.encode
    monkeypatch.setattr(PackedEncoder, "encode", encode)
    return seen


def test_job_keeps_to_the_threads_that_it_began_with(photos, tmp_path, model, stop_after, threads_of_packs):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        embed(photos, tmp_path / "whole", model)
        embed(photos, tmp_path / "out", model, **stop_after(1))
        torch.set_num_threads(3)
        summary = embed(photos, tmp_path / "out", model)
        assert torch.get_num_threads() == 3
        assert (summary.rows, summary.done) == (12, 7)
        assert {*threads_of_packs} == {1}
        assert nopad.read_features(tmp_path / "out").metadata["threads"] == "1"
        assert table(tmp_path / "out") == table(tmp_path / "whole")

        embed(photos, tmp_path / "three", model)  # a job of its own
        assert threads_of_packs[-1] == 3
        assert not {*table(tmp_path / "three")} & {*table(tmp_path / "out")}
    finally:
        torch.set_num_threads(before)


def test_stopped_before_the_first_shard(photos, tmp_path, model):
    stop = threading.Event()
    stop.set()
    summary = embed(photos, tmp_path / "out", model, stop=stop)
    assert (summary.rows, summary.done, summary.missing, summary.to_go) == (0, 0, 12, 12)
    with pytest.raises(ValueError, match="no shard of its job is finished"):
        nopad.read_features(tmp_path / "out")
    assert embed(photos, tmp_path / "out", model).rows == 12


def test_a_finished_job_has_nothing_to_do(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    summary = embed(photos, tmp_path / "out", model, retry_failed=True)
    assert (summary.rows, summary.done, summary.seconds, summary.to_go) == (12, 0, 0, 0)
    assert table(tmp_path / "out") == before


def test_a_lost_shard_is_made_again(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    (tmp_path / "out" / sorted(before)[1]).unlink()
    assert embed(photos, tmp_path / "out", model).done == 5
    assert table(tmp_path / "out") == before


def test_what_a_killed_run_left_half_written_goes_away(photos, tmp_path, model, stop_after):
    embed(photos, tmp_path / "out", model, **stop_after(1))
    for name in ("shard-00001-of-00003-abc.parquet.part", "inputs.parquet.part"):
        (tmp_path / "out" / ".nopad" / name).write_bytes(b"half")
    embed(photos, tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out" / ".nopad").iterdir()) == [
        "inputs.parquet",
        "job.json",
        "lock",
        "stamps.parquet",
    ]


@pytest.mark.parametrize(
    ("there", "now"),
    [
        (("photos", "model"), ("photos/", "model/")),
        (("photos/", "model/"), ("photos", "model")),
        (("photos/../photos", "./model"), ("./photos", "photos/../model")),
    ],
)
def test_another_spelling_of_a_path_is_the_same_job(photos, tmp_path, monkeypatch, model, there, now, stop_after):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    embed(there[0], tmp_path / "out", there[1], **stop_after(1))
    summary = embed(now[0], tmp_path / "out", now[1])
    assert (summary.rows, summary.changes) == (12, [])
    features = nopad.read_features(tmp_path / "out")
    assert {*features.sources} == {there[0]}
    assert features.metadata["model"] == there[1]
    assert embed(now[0], tmp_path / "out", nopad.load(now[1])).done == 0


def test_a_path_is_another_one_where_a_link_makes_it_so(photos, tmp_path, monkeypatch, model):
    write_photos(tmp_path / "far" / "photos", 2)
    (tmp_path / "far" / "away").mkdir()
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path)
    embed("photos", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r'sources: \["photos"\] there, \["link/../photos"\] now'):
        embed("link/../photos", tmp_path / "out", model)


def test_a_link_to_a_folder_is_another_path(photos, tmp_path, monkeypatch, model):
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    embed("photos", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r'sources: \["photos"\] there, \["link"\] now'):
        embed("link", tmp_path / "out", model)


def test_a_glob_is_what_it_is_spelled(photos, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    embed("photos/*.png", tmp_path / "out", model)
    with pytest.raises(ValueError, match=r"sources: .* there, .* now"):
        embed("./photos/*.png", tmp_path / "out", model)


# Refusals


CHANGES = {
    "dtype": ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now"),
    "capacity": ({"capacity": 64}, "capacity: 2048 there, 64 now"),
    "resize": ({"resize": "pil"}, "resize: torch there, pil now"),
    "max_patches": ({"max_patches": 9}, "max_patches: 4096 there, 9 now"),
    "size": ({"size": 16}, "size: native there, 16 now"),
    "min_patches": ({"min_patches": 9}, "min_patches: none there, 9 now"),
    "multiple_of": ({"multiple_of": 2}, "multiple_of: 1 there, 2 now"),
    "frames": ({"frames": 4}, "frames: 8 there, 4 now"),
    "max_pixels": ({"max_pixels": 1000}, "max_pixels: 178956970 there, 1000 now"),
    "tokens": ({"tokens": True}, "tokens: no there, yes now"),
    "embedding_dtype": ({"embedding_dtype": "float16"}, "embedding_dtype: float32 there, float16 now"),
    "embedding_list": ({"embedding_list": "variable"}, "embedding_list: fixed there, variable now"),
    "shard_size": ({"shard_size": 4}, "shard_size: 5 there, 4 now"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model) -> tuple[Path, Path]:
    """A source and a finished job of it, which refusals leave as it is."""
    folder = tmp_path_factory.mktemp("begun")
    write_photos(folder / "photos", 6)
    embed(folder / "photos", folder / "out", model)
    return folder / "photos", folder / "out"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_told(begun, model, change):
    options, told = CHANGES[change]
    before = table(begun[1])
    with pytest.raises(ValueError, match="holds a job with other settings:\n") as caught:
        embed(*begun, model, **options)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{begun[1]} holds a job with other settings:"
    assert len(lines) == 3
    assert re.fullmatch(told, lines[1].strip())
    assert lines[2] == "use the settings that it was begun with, or another folder"
    assert table(begun[1]) == before


def test_a_revision_is_the_hubs_and_part_of_the_record(begun, tmp_path, monkeypatch, model):
    """The Hub is a folder here."""
    asked = []

    def load(name, *, revision, **options):
        asked.append(revision)
        return nopad.load(name, **options)

    monkeypatch.setattr(workers, "load", load)
    monkeypatch.setattr(workers, "open_checkpoint", lambda name, *, revision: open_checkpoint(name))
    embed(begun[0], tmp_path / "out", model, revision="v1")
    assert nopad.read_features(tmp_path / "out").metadata["revision"] == "v1"
    with pytest.raises(ValueError, match="revision: v1 there, v2 now"):
        embed(begun[0], tmp_path / "out", model, revision="v2")
    assert asked == ["v1", "v2"]


def test_features_are_those_of_evaluation_in_the_encoders_dtype(begun, tmp_path, model):
    encoder = nopad.load(model)
    with torch.autocast("cpu", torch.bfloat16):
        embed(begun[0], tmp_path / "out", encoder)
    assert np.array_equal(nopad.read_features(tmp_path / "out").embeddings, nopad.read_features(begun[1]).embeddings)
    encoder.train()
    for run_it in (lambda: embed(begun[0], tmp_path / "out", encoder), lambda: encoder.embed([])):
        with pytest.raises(ValueError, match=r"encoder: expected in evaluation mode.*call its eval\(\) first"):
            run_it()


def test_another_version_model_or_source_is_told(begun, tmp_path, monkeypatch, model, clip_model):
    shutil.copytree(begun[0], tmp_path / "photos")
    with pytest.raises(ValueError, match=r'sources: \[".*photos"\] there, \[".*photos/"\] now'):
        embed(f"{tmp_path}/photos/", begun[1], model)
    with pytest.raises(ValueError, match=r"(?s)model: .*family: aimv2 there, onevision now.*weights: "):
        embed(*begun, clip_model)
    monkeypatch.setattr(manifest, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=rf"version: {re.escape(nopad.__version__)} there, 9.9.9 now"):
        embed(*begun, model)


def test_a_model_that_changed_in_place_is_told(photos, tmp_path, model):
    changed = shutil.copytree(model, tmp_path / "model")
    embed(photos, tmp_path / "out", changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match=r"settings:\n  architecture: num_attention_heads 4 there, 2 now\nuse"):
        embed(photos, tmp_path / "out", changed)
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"settings:\n  preprocessing: .* mean 0.5, 0.5, 0.5; .* now\nuse"):
        embed(photos, tmp_path / "out", changed)
    (changed / "preprocessor_config.json").unlink()
    weights = load_file(changed / "model.safetensors")
    save_file({**weights, "rms_norm.weight": weights["rms_norm.weight"] * 1.001}, changed / "model.safetensors")
    with pytest.raises(ValueError, match=r"settings:\n  weights: [0-9a-f]{64} there, [0-9a-f]{64} now\nuse"):
        embed(photos, tmp_path / "out", changed)


def test_shards_of_somebody_else(photos, tmp_path, model):
    (tmp_path / "out").mkdir()
    foreign = tmp_path / "out" / "shard-00000-of-00001-abcdef123456.parquet"
    foreign.touch()
    with pytest.raises(ValueError, match=f"{foreign}: not a shard of this job; move it away or use another folder"):
        embed(photos, tmp_path / "out", model)
    assert sorted(path.name for path in (tmp_path / "out" / ".nopad").iterdir()) == ["lock"]
    foreign.unlink()
    embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / "shard-mine.parquet").touch()
    with pytest.raises(ValueError, match="not a shard of this job"):
        embed(photos, tmp_path / "out", model)


def test_files_that_are_no_shards_of_the_job_are_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    first, second, third = (tmp_path / "out" / name for name in sorted(before))
    for stray in ("shard-00099-of", "shard-00003-of", "shard-000000-of"):
        path = tmp_path / "out" / first.name.replace("shard-00000-of", stray)
        shutil.copy(first, path)
        with pytest.raises(ValueError, match=f"{path}: not a shard of this job; move it away or use another folder"):
            embed(photos, tmp_path / "out", model)
        path.unlink()

    second.unlink()
    shutil.copy(first, second)
    refused = f"{second}: not this shard: shard 0, expected 1; move it away and run the job again"
    with pytest.raises(ValueError, match=refused):
        embed(photos, tmp_path / "out", model)
    with pytest.raises(ValueError, match=f"{second}: a copy of shard 0; move it away"):
        nopad.read_features(tmp_path / "out")
    second.unlink()
    assert embed(photos, tmp_path / "out", model).done == 5
    assert table(tmp_path / "out") == before

    os.rename(first, tmp_path / "away")
    os.rename(third, first)  # of other rows, too
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()  # shards that fit are kept, no others
    with pytest.raises(ValueError, match=f"{first}: not this shard: shard 2, expected 0"):
        embed(photos, tmp_path / "out", model)
    assert not (tmp_path / "out" / ".nopad" / "job.json").exists()


def test_shard_of_another_job_under_this_jobs_name_is_refused(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    embed(photos, tmp_path / "other", model, capacity=64)
    [*_, last] = sorted((tmp_path / "out").glob("*.parquet"))
    shutil.copy(sorted((tmp_path / "other").glob("*.parquet"))[-1], last)
    with pytest.raises(ValueError, match=f"{last}: not this shard: capacity 64, expected 2048"):
        embed(photos, tmp_path / "out", model)


@pytest.mark.parametrize("when", ["before it is begun", "before a shard", "while a shard is written"])
def test_folder_that_is_begun_anew_gets_no_shard_of_the_first_job(photos, tmp_path, monkeypatch, model, when):
    out = tmp_path / "out"
    embed(photos, tmp_path / "whole", model)

    def begin_anew(*arguments, **options):
        monkeypatch.undo()
        if when == "while a shard is written":
            shutil.rmtree(out)
            embed(photos, out, model)
            for path in out.glob("*.parquet"):
                path.unlink()
            return real(*arguments, **options)
        shutil.rmtree(out)
        embed(photos, out, model)
        return real(*arguments, **options)

    if when == "before it is begun":
        real, place = job.JobFolder.begin, (job.JobFolder, "begin")
    elif when == "before a shard":
        real, place = job.Job.write, (job.Job, "write")
    else:
        real, place = job.write_shard, (job, "write_shard")
    monkeypatch.setattr(*place, begin_anew)
    with pytest.raises(LostLockError, match=f"{out}: removed or begun anew while this job ran"):
        embed(photos, out, model)
    assert table(out) == ({} if when == "while a shard is written" else table(tmp_path / "whole"))
    assert not list(out.rglob("*.part"))
    embed(photos, out, model)
    assert table(out) == table(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("job.json", b'{"version": "0.1'),
        ("job.json", b"[]"),
        ("job.json", b'{"inputs": 3}'),
        ("job.json", b'{"inputs": "", "threads": "-1"}'),
        ("job.json", b"\xff"),
        ("job.json", b"[" * 100_000),
        ("job.json", b'{"model": [], "sources": "[[], 5]"}'),
        ("job.json", b'{"model": "a", "sources": "' + b"[" * 100_000 + b'"}'),
        ("inputs.parquet", b"PAR1"),
        ("inputs.parquet", None),
    ],
)
def test_damaged_files_of_a_job(photos, tmp_path, model, name, data):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / ".nopad" / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the job's files cannot be read \(.*\); remove job\.json there and run"):
        embed(photos, tmp_path / "out", model)
    (tmp_path / "out" / ".nopad" / "job.json").unlink()
    assert embed(photos, tmp_path / "out", model).done == 0
    assert table(tmp_path / "out") == before


def test_layers_that_run_otherwise_are_told(photos, tmp_path, model):
    encoder = nopad.load(model)
    nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)
    encoder.compile(2048, compiled=False)
    with pytest.raises(ValueError, match="compile: no there, yes now"):
        nopad.embed(photos, tmp_path / "out", model=encoder, capacity=2048)


def test_a_list_of_another_job(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    inputs.InputList.of([Input("a", "b", "image", b"/a")]).save(tmp_path / "out" / ".nopad" / "inputs.parquet")
    with pytest.raises(ValueError, match=r"inputs\.parquet is not the list that job\.json was begun with"):
        embed(photos, tmp_path / "out", model)


def test_a_damaged_shard(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    path = tmp_path / "out" / next(iter(before))
    path.write_bytes(before[path.name][:-100])
    with pytest.raises(ValueError, match=f"{path}: damaged .*; delete it and run the job again"):
        embed(photos, tmp_path / "out", model)
    path.unlink()
    embed(photos, tmp_path / "out", model)
    assert table(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames: expected ≥ 1, got 0"),
        ({"max_pixels": 0}, "max_pixels: expected ≥ 1, got 0"),
        ({"capacity": 0}, "capacity: expected ≥ 1, got 0"),
        ({"workers": 0}, "workers: expected ≥ 1, got 0"),
        ({"actors": 0}, "actors: expected ≥ 1, got 0"),
        ({"shard_size": 0}, "shard_size: expected ≥ 1, got 0"),
        ({"max_patches": 0}, "max_patches: expected ≥ 1, got 0"),
        ({"size": 0}, r"size: expected 'model', 'native', pixels ≥ 1 of the short side, or \(height, width\)"),
        ({"size": "large"}, "size: expected 'model', 'native', .* got 'large'"),
        ({"min_patches": 0}, "min_patches: expected ≥ 1, got 0"),
        ({"multiple_of": 0}, "multiple_of: expected ≥ 1, got 0"),
        ({"max_patches": "all"}, "max_patches: expected an integer ≥ 1, got 'all'"),
        ({"shard_size": 2.5}, r"shard_size: expected an integer ≥ 1, got 2\.5"),
        ({"capacity": "5"}, "capacity: expected an integer ≥ 1, got '5'"),
        ({"actors": True}, "actors: expected an integer ≥ 1, got True"),
        ({"tokens": "no"}, "tokens: expected True or False, got 'no'"),
        ({"stop": True}, r"stop: expected a threading\.Event, got True"),
        ({"dtype": "int8"}, "dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"precision": "fp4"}, "precision: expected one of fp8, got 'fp4'"),
        ({"compile": 1}, "compile: expected True or False, got 1"),
        ({"device": "abacus"}, "device: expected cpu, cuda, cuda:1, …, got 'abacus'"),
        ({"device": "meta"}, "device: expected cpu, cuda, cuda:1, …, got 'meta'"),
        ({"resize": "lanczos"}, "resize: expected one of torch, pil, got 'lanczos'"),
        ({"frames": None}, "frames: expected an integer ≥ 1, got None"),
        ({"embedding_dtype": "float64"}, "embedding_dtype: expected one of float32, float16, got 'float64'"),
        ({"embedding_list": "nested"}, "embedding_list: expected one of fixed, variable, got 'nested'"),
        ({"attention": "magic"}, "attention: expected 'auto' or one of"),
    ],
)
def test_a_wrong_argument_begins_no_job(photos, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        embed(photos, tmp_path / "out", model, **options)
    assert not (tmp_path / "out" / ".nopad" / "job.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"device": "cpu"},
        {"precision": "fp8"},
        {"compile": False},
        {"revision": "a"},
        {"attention": "sdpa"},
        {"actors": 1},
    ],
)
def test_an_encoder_brings_its_own(photos, tmp_path, model, options):
    with pytest.raises(
        ValueError, match="model: an encoder brings its own device, dtype, precision, revision and attention"
    ):
        embed(photos, tmp_path / "out", nopad.load(model), **options)
    assert not (tmp_path / "out").exists()


def test_wrong_sources_and_models_begin_no_job(photos, tmp_path, model):
    for sources, message in (
        ([], "sources: expected a list"),
        (tmp_path / "nothing", "nothing: cannot be opened: No such file"),
        (model, "no picture or video in it; left out: 1 .json, 1 .safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            embed(sources, tmp_path / "out", model)
        assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="nowhere"):
        embed(photos, tmp_path / "out", tmp_path / "nowhere")
    assert not (tmp_path / "out" / ".nopad" / "job.json").exists()


# Disks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["list", "shard", "rename"])
def test_a_disk_that_refuses_leaves_nothing_half_written(photos, tmp_path, monkeypatch, model, number, where):
    out = tmp_path / "out"
    embed(photos, tmp_path / "whole", model)

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    def fsync(descriptor):
        if "shard" in os.readlink(f"/proc/self/fd/{descriptor}"):
            refuse()

    def replace(source, target):
        refuse() if "shard-00001" in str(target) else real(source, target)

    real = os.replace
    with monkeypatch.context() as patch:
        if where == "list":
            patch.setattr(pq, "write_table", refuse)
        else:
            patch.setattr(os, *{"shard": ("fsync", fsync), "rename": ("replace", replace)}[where])
        with pytest.raises(OSError, match=f"{out}: {os.strerror(number)}; ") as caught:
            embed(photos, out, model)
    assert caught.value.errno == number
    assert not list(out.rglob("*.part"))
    assert len(table(out)) == (where == "rename")
    assert (out / ".nopad" / "job.json").exists() == (where != "list")
    embed(photos, out, model)
    assert table(out) == table(tmp_path / "whole")


def test_a_disk_that_is_really_full(photos, tmp_path, model):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # the system's answer to every byte beyond
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'out'}: File too large; see to the disk") as caught:
            embed(photos, tmp_path / "out", model, tokens=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not list((tmp_path / "out").rglob("*.part"))
    assert table(tmp_path / "out") == {}
    assert embed(photos, tmp_path / "out", model, tokens=True).rows == 12


def test_out_is_a_file(photos, tmp_path, model):
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match=f"{tmp_path / 'out'}: "):
        embed(photos, tmp_path / "out", model)


@pytest.mark.parametrize("leads", ["to a file", "nowhere"])
def test_links_at_the_places_of_a_jobs_files_are_not_written_through(photos, tmp_path, model, leads):
    embed(photos, tmp_path / "whole", model)
    victim = tmp_path / "victim"
    if leads == "to a file":
        victim.write_text("{}")
    own = tmp_path / "out" / ".nopad"
    own.mkdir(parents=True)
    names = [
        "owner.json",
        "inputs.parquet",
        *([] if leads == "to a file" else ["job.json", *table(tmp_path / "whole")]),
    ]
    for name in names:
        ((own.parent if name.startswith("shard") else own) / name).symlink_to(victim)
    if leads == "nowhere":
        with pytest.raises(OSError, match="No such file"):  # a shard that is there by its name
            embed(photos, tmp_path / "out", model)
        for name in table(tmp_path / "whole"):
            (own.parent / name).unlink()
    embed(photos, tmp_path / "out", model)
    assert table(tmp_path / "out") == table(tmp_path / "whole")
    assert victim.exists() == (leads == "to a file")
    assert leads == "nowhere" or victim.read_text() == "{}"


# Sources that change


def test_a_source_that_grows_and_shrinks_is_told_and_the_list_is_kept(photos, tmp_path, caplog, model, stop_after):
    embed(photos, tmp_path / "whole", model)
    embed(photos, tmp_path / "out", model, **stop_after(1))
    write_photos(photos, 2, start=50)
    (photos / "011.png").unlink()
    summary = embed(photos, tmp_path / "out", model)
    told = "since this job began, its sources have 2 new inputs and 1 is gone; it keeps to the list that it began with"
    assert len(summary.changes) == 1
    assert summary.changes[0].startswith(told)
    assert told in caplog.text
    assert (summary.rows, summary.failed) == (12, 1)
    assert errors(tmp_path / "out") == {"011.png": "cannot be read: No such file or directory"}
    whole, out = table(tmp_path / "whole"), table(tmp_path / "out")
    assert [whole[name] == out[name] for name in whole] == [True, True, False]


def test_a_list_in_another_order_is_told(photos, tmp_path, model):
    (tmp_path / "list.txt").write_text("photos/000.png\nphotos/001.png\n")
    embed(tmp_path / "list.txt", tmp_path / "out", model)
    (tmp_path / "list.txt").write_text("photos/001.png\nphotos/000.png\n")
    (change,) = embed(tmp_path / "list.txt", tmp_path / "out", model).changes
    assert "0 new inputs and 0 are gone, but they come in another order" in change


def write_tar(path: Path, photos: Path, number: int, first: int = 0) -> None:
    with tarfile.open(path, "w") as archive:
        for photo in sorted(photos.iterdir())[first : first + number]:
            archive.add(photo, photo.name)


def test_a_tar_that_was_written_anew_is_refused(photos, tmp_path, model, stop_after):
    tar = tmp_path / "a.tar"
    write_tar(tar, photos, 6)
    embed(tar, tmp_path / "out", model, **stop_after(1))
    write_tar(tar, photos, 8)
    assert "2 new inputs and 0 are gone" in embed(tar, tmp_path / "out", model).changes[0]  # they stand behind the old
    with Image.open(photos / "000.png") as image:
        image.resize((90, 90)).save(photos / "000.png")
    write_tar(tar, photos, 6)
    with pytest.raises(ValueError, match=r"holds a job of which 6 inputs are elsewhere now; .*a\.tar at byte \d+"):
        embed(tar, tmp_path / "out", model)


def test_the_same_name_for_another_folder_is_refused(photos, tmp_path, monkeypatch, model):
    write_photos(tmp_path / "other" / "photos", 12)
    monkeypatch.chdir(tmp_path)
    embed("photos", tmp_path / "out", model)
    monkeypatch.chdir(tmp_path / "other")
    where = rf"000\.png of photos: {photos}/000\.png there, {tmp_path}/other/photos/000\.png now"
    with pytest.raises(ValueError, match=f"12 inputs are elsewhere now; the first is {where}"):
        embed("photos", tmp_path / "out", model)


def test_a_picture_that_vanishes_between_listing_and_reading(photos, tmp_path, monkeypatch, model):
    def list_inputs(*arguments, **options):
        listing = real(*arguments, **options)
        (photos / "004.png").unlink()
        return listing

    real = api.list_inputs
    monkeypatch.setattr(api, "list_inputs", list_inputs)
    summary = embed(photos, tmp_path / "out", model)
    assert (summary.rows, summary.failed) == (12, 1)
    assert errors(tmp_path / "out") == {"004.png": "cannot be read: No such file or directory"}


def test_an_unexpected_error_of_the_reader_is_a_row(photos, tmp_path, monkeypatch, model):
    def media(self, item):
        if item.id == "003.png":
            raise ZeroDivisionError("a bug")
        return real(self, item)

    real = Reader.media
    monkeypatch.setattr(Reader, "media", media)
    assert embed(photos, tmp_path / "out", model).failed == 1
    assert errors(tmp_path / "out") == {"003.png": "unexpected ZeroDivisionError: a bug"}


def test_the_table_may_lie_in_its_source(photos, tmp_path, model, stop_after):
    embed(photos, tmp_path / "whole", model)
    for out in (photos / "out", photos):
        embed(photos, out, model, **stop_after(1))
        summary = embed(photos, out, model)
        assert (summary.rows, summary.failed, summary.changes, summary.left_out) == (12, 0, [], {})
        assert nopad.read_features(out).ids == nopad.read_features(tmp_path / "whole").ids
        assert embed(f"{photos}/*", tmp_path / f"again-{out.name}", model).rows == 12


def test_the_table_may_lie_beside_the_tars_that_it_is_made_from(photos, tmp_path, model, stop_after):
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", photos, 12)
    embed(tmp_path / "tars", tmp_path / "tars" / "out", model, **stop_after(1))
    summary = embed(tmp_path / "tars", tmp_path / "tars" / "out", model)
    assert (summary.rows, summary.changes) == (12, [])


# Failures


def test_retried_rows_are_replaced_and_the_others_keep_their_bits(photos, tmp_path, model):
    kept = {name: (photos / name).read_bytes() for name in ("001.png", "006.png", "007.png")}
    for name in kept:
        (photos / name).write_bytes(b"no picture")
    embed(photos, tmp_path / "out", model, tokens=True)
    before, first = table(tmp_path / "out"), rows(tmp_path / "out")
    assert embed(photos, tmp_path / "out", model, tokens=True).done == 0  # failures stay unless asked for
    for name in ("001.png", "006.png"):
        (photos / name).write_bytes(kept[name])
    summary = embed(photos, tmp_path / "out", model, tokens=True, retry_failed=True)
    assert (summary.rows, summary.failed, summary.done, summary.to_go) == (12, 1, 3, 0)
    assert (summary.stats.images, summary.stats.failed) == (3, 1)
    after, second = table(tmp_path / "out"), rows(tmp_path / "out")
    names = sorted(before)
    assert sorted(after) == names
    assert [before[name] == after[name] for name in names] == [False, False, True]
    assert list(errors(tmp_path / "out")) == ["007.png"]
    for old, new in zip(first, second, strict=True):
        assert new == old or new["id"] in ("001.png", "006.png")
    encoder = nopad.load(model)
    vector = nopad.read_features(tmp_path / "out").embeddings[1]
    np.testing.assert_array_equal(vector, encoder.embed([photos / "001.png"])[0].numpy())


def test_retrying_what_fails_again_changes_nothing(photos, tmp_path, model):
    (photos / "001.png").write_bytes(b"no picture")
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    summary = embed(photos, tmp_path / "out", model, retry_failed=True)
    assert (summary.done, summary.failed, summary.shards_with_failures) == (1, 1, [min(before)])
    assert table(tmp_path / "out") == before


def test_a_retry_that_is_stopped_tells_what_it_left(photos, tmp_path, model, stop_after):
    kept = {path: path.read_bytes() for path in photos.iterdir()}
    for path in kept:
        path.write_bytes(b"no picture")
    assert embed(photos, tmp_path / "out", model).failed == 12
    assert len(table(tmp_path / "out")) == 3
    for path, data in kept.items():
        path.write_bytes(data)
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, **stop_after(1))
    assert (summary.rows, summary.failed, summary.missing, summary.to_go) == (12, 7, 0, 7)
    told: list[Progress] = []
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, progress=told.append)
    assert (summary.failed, summary.done, summary.to_go) == (0, 7, 0)
    assert (told[-1].rows, told[-1].kept, told[-1].stats.images) == (7, 5, 7)
    np.testing.assert_array_equal(
        nopad.read_features(tmp_path / "out").embeddings[:5],
        nopad.load(model).embed(sorted(photos.iterdir())[:5]).numpy(),
    )


def test_a_retry_that_is_killed_leaves_each_shard_old_or_new(photos, tmp_path, monkeypatch, model):
    kept = (photos / "006.png").read_bytes()
    (photos / "006.png").write_bytes(b"no picture")
    embed(photos, tmp_path / "out", model)
    before = table(tmp_path / "out")
    (photos / "006.png").write_bytes(kept)

    def replace(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            embed(photos, tmp_path / "out", model, retry_failed=True)
    assert table(tmp_path / "out") == before
    assert embed(photos, tmp_path / "out", model, retry_failed=True).failed == 0


def test_retries_and_missing_shards_are_counted_together(photos, tmp_path, model, stop_after):
    (photos / "001.png").write_bytes(b"no picture")
    embed(photos, tmp_path / "out", model, **stop_after(1))
    told: list[Progress] = []
    summary = embed(photos, tmp_path / "out", model, retry_failed=True, progress=told.append)
    assert {(progress.rows, progress.kept) for progress in told} == {(8, 4)}
    assert (summary.done, summary.stats.images) == (8, 8)
    assert told[-1].stats.images == 8


# Layers


def test_tokens_of_layers_in_a_table(photos, tmp_path):
    model = tiny("dinov3", tmp_path / "dinov3")
    options = {"tokens": True, "layers": [0, -1], "pool": "cls+mean", "tokens_pool": 2}
    embed(photos, tmp_path / "out", model, **options)
    features = nopad.read_features(tmp_path / "out")
    encoder = nopad.load(model)
    assert features.embeddings.shape[1] == 4 * encoder.hidden_size
    for index in (0, len(features) - 1):
        t, h, w = features.grids[index]
        assert features.tokens[index].shape == (2, t, -(-h // 2), -(-w // 2), encoder.hidden_size)
    assert (features.tokens.layers, features.tokens.pool) == ((0, 2), 2)
    expected = {"layers": "0,2", "pool": "cls+mean", "tokens_pool": "2", "embedding": "cls+mean of layers 0,2"}
    assert {key: features.metadata[key] for key in expected} == expected
    images = [photos / name for name in features.ids]
    np.testing.assert_array_equal(encoder.embed(images, layers=[0, -1], pool="cls+mean"), features.embeddings)
    match = features.search(image=images[3], k=1, encoder=encoder)[0]
    assert (match.id, match.score) == (features.ids[3], pytest.approx(1))
    embed(photos, tmp_path / "out", model, **{**options, "layers": (0, 2)}, retry_failed=True)  # the same layers
    with pytest.raises(ValueError, match=r"layers: 0,2 there, 0 now"):
        embed(photos, tmp_path / "out", model, **{**options, "layers": [0]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3], "tokens": True}, "layers: expected -3 to 2, got 3; there are 3 layers"),
        ({"layers": "0", "tokens": True}, "layers: expected a tuple of one integer or more, got '0'"),
        ({"layers": [0]}, "layers: the model's own vector is of the last one"),
        ({"pool": "max"}, r"pool: expected one of model, cls, mean, cls\+mean, got 'max'"),
        ({"pool": "cls"}, "pool: expected model or mean, since this model has no CLS token, got cls"),
        ({"tokens_pool": 2}, "tokens_pool: goes with tokens"),
    ],
)
def test_layers_that_there_are_not(photos, tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        embed(photos, tmp_path / "out", model, **options)

"""The table of a job: its rows, its columns, its metadata."""

import json
import shutil

import duckdb
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch
from jobs import embed, errors, rows, table
from pictures import write_video
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import tiny

import nopad
from nopad.embedding import manifest
from nopad.embedding import rows as table_rows
from nopad.embedding.table import reader as stored
from nopad.preprocessing.video import read_frames


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
    as_dict = summary.to_dict()
    assert json.loads(json.dumps(as_dict)) == as_dict
    assert as_dict["per_second"]["images"] == pytest.approx(12 / summary.seconds)
    assert as_dict["fill"] == 1.0


def test_other_programs_read_it_as_it_is(photos, tmp_path, model):
    embed(photos, tmp_path / "out", model)
    features = nopad.read_features(tmp_path / "out")
    matrix = features.embeddings
    assert (matrix.shape, matrix.dtype, features.tokens) == ((12, 32), np.float32, None)
    frame = pandas.read_parquet(tmp_path / "out")
    assert frame["id"].tolist() == features.ids
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), matrix)
    np.testing.assert_array_equal(np.array(pq.read_table(tmp_path / "out")["embedding"].to_pylist()), matrix)
    matches = duckdb.connect().execute(f"select embedding from '{tmp_path}/out/*.parquet' order by id").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in matches]), matrix)


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
    encoder = nopad.load(goldens / "aimv2-apple-native")
    digest = manifest.weights_digest(encoder)
    begun = manifest.begin_weights_digest(encoder)
    encoder.compile(64)
    assert begun.result() == digest
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


def test_tokens_of_layers_in_a_table(photos, tmp_path):
    model = tiny("dinov3", tmp_path / "dinov3")
    options = {"tokens": True, "layers": [0, -1], "pool": "cls+mean", "tokens_pool": 2, "size": 36}
    embed(photos, tmp_path / "out", model, **options)
    features = nopad.read_features(tmp_path / "out")
    encoder = nopad.load(model, size=36)
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

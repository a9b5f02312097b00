"""What a table in memory can be asked for."""

import dataclasses
import shutil

import numpy as np
import pandas
import pytest
import text_checkpoints
import torch

import nopad
from nopad.search.query import Match


def test_rows_are_dicts(features, photos):
    assert len(features) == 13
    assert [row["id"] for row in features] == features.ids
    row = features[-1]
    assert row.keys() == {"id", "source", "width", "height", "grid", "embedding"}
    assert (row["source"], row["grid"]) == (str(photos), tuple(features.grids[-1]))
    assert (row["height"], row["width"]) == tuple(features.sizes[-1])
    np.testing.assert_array_equal(row["embedding"], features.embeddings[-1])
    assert [row["id"] for row in features[2:4]] == features.ids[2:4]
    with pytest.raises(IndexError, match="row 13, expected -13 to 12"):
        features[13]


def test_paths_and_images_of_rows_behind_a_failed_one(features, photos):
    assert [failure.id for failure in features.failures] == ["damaged.jpg"]
    for row, id in enumerate(features.ids):
        assert features.path(row) == str(photos / id)
    assert features.read(-1) == (photos / features.ids[-1]).read_bytes()


def test_a_row_of_an_archive_is_read_from_it(photos, model, tmp_path):
    tar = tmp_path / "photos.tar"
    shutil.make_archive(str(tar.with_suffix("")), "tar", photos)
    nopad.embed(tar, tmp_path / "out", model=model, workers=1)
    features = nopad.read(tmp_path / "out")
    row = features.ids.index("./003.png")
    assert features.path(row) == str(tar)
    assert features.read(row) == (photos / "003.png").read_bytes()


def test_without_its_list_a_table_has_no_paths(table, tmp_path):
    shutil.copytree(table, tmp_path / "copy", ignore=shutil.ignore_patterns(".nopad"))
    features = nopad.read(tmp_path / "copy")
    assert len(features.search(id="003.png", k=2)) == 2
    with pytest.raises(ValueError, match=r"copy: where its images are is not known: .* copy .nopad with the shards"):
        features.path(0)


def test_normalized(features):
    np.testing.assert_allclose(np.linalg.norm(features.normalized, axis=1), 1, atol=1e-6)
    assert features.normalized.dtype == np.float32
    assert features.normalized is features.normalized


def test_to_pandas(features):
    frame = features.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["id"].tolist() == features.ids
    assert frame["width"].tolist() == features.sizes[:, 1].tolist()
    np.testing.assert_array_equal(np.stack(frame["embedding"].tolist()), features.embeddings)


def test_search_by_id_leaves_the_row_itself_out(features):
    best, *others = features.search(id="000.png", k=12)
    assert isinstance(best, Match)
    assert (best.id, round(best.score, 6)) == ("copy.png", 1.0)
    assert len(others) == 11
    assert "000.png" not in {match.id for match in others}
    assert [match.score for match in others] == sorted((match.score for match in others), reverse=True)


def test_search_by_an_image_finds_it(features, photos):
    for image in (photos / "004.png", (photos / "004.png").read_bytes()):
        best = features.search(image=image, k=1)[0]
        assert best.id == "004.png"
        assert best.score > 0.9999
    assert features.encoder.dtype == torch.float32


def test_search_by_a_vector(features):
    for vector in (features.embeddings[3], torch.tensor(features.embeddings[3]), features.embeddings[3].tolist()):
        assert features.search(vector=vector, k=1)[0].row == 3


def test_a_loaded_encoder_is_taken_if_it_has_the_tables_weights(features, photos, model):
    encoder = nopad.load(model)
    assert features.search(image=photos / "004.png", k=1, encoder=encoder)[0].id == "004.png"
    assert "encoder" not in features.__dict__
    with torch.no_grad():
        encoder.embeddings.proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"the table was made by .*: expected weights [0-9a-f]{64}, got "):
        features.search(image=photos / "004.png", encoder=encoder)
    with pytest.raises(ValueError, match="expected dtype float32, got bfloat16"):
        features.search(image=photos / "004.png", encoder=encoder.bfloat16())


def test_a_model_that_has_moved_or_changed(features, photos, tmp_path):
    features.metadata["model"] = str(tmp_path / "gone")
    with pytest.raises(OSError, match=r"the model that made the table cannot be loaded: .* --model, where it is now"):
        features.search(image=photos / "004.png")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "exactly one of text, image, vector, id, got none"),
        ({"text": "dog", "id": "a"}, "exactly one of text, image, vector, id, got text, id"),
        ({"text": " "}, "text: expected words, got ' '"),
        ({"text": 3}, "text: expected words, got 3"),
        ({"id": "000.pn"}, "no row of this table is called '000.pn'"),
        ({"id": "damaged.jpg"}, r"'damaged.jpg' has no features: .*; features.failures lists such rows"),
        ({"vector": [1.0]}, r"vector: expected \(32,\) numbers, got float64 \(1,\)"),
        ({"vector": np.zeros(32)}, "finite values that are not all 0"),
        ({"vector": np.full(32, np.nan)}, "finite values"),
        ({"id": "000.png", "k": 0}, "k: expected ≥ 1, got 0"),
    ],
)
def test_a_query_that_is_none(features, query, message):
    with pytest.raises(ValueError, match=message):
        features.search(**query)


def test_duplicates_have_the_largest_first(features):
    [group] = features.duplicates(0.999999)
    assert sorted(group.ids) == ["000.png", "copy.png"]
    assert [features.ids[row] for row in group.rows] == group.ids
    [everything] = features.duplicates(0.01)
    pixels = features.sizes.prod(axis=1)[everything.rows]
    assert pixels.tolist() == sorted(pixels, reverse=True)
    for threshold in (0, 1.5, float("nan"), True, "high"):
        with pytest.raises(ValueError, match="threshold: expected a cosine above 0, at most 1"):
            features.duplicates(threshold)


def test_clusters_have_each_row_once(features):
    groups = features.clusters(4)
    assert sorted(row for group in groups for row in group.rows) == list(range(13))
    assert [len(group) for group in groups] == sorted(map(len, groups), reverse=True)
    pair = {features.ids.index("000.png"), features.ids.index("copy.png")}
    assert any(pair <= set(group.rows.tolist()) for group in groups)
    again = features.clusters(4)
    assert [group.ids for group in again] == [group.ids for group in groups]
    with pytest.raises(ValueError, match="k: expected at most the table's 13 rows, got 14"):
        features.clusters(14)


def test_clusters_are_what_was_put_in(features):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 32))
    rows = np.repeat(centres, [6, 4, 3], axis=0) * rng.uniform(1, 9, (13, 1)) + 0.01 * rng.standard_normal((13, 32))
    features.embeddings[:] = rows
    assert [sorted(group.rows.tolist()) for group in features.clusters(3)] == [
        list(range(6)),
        list(range(6, 10)),
        list(range(10, 13)),
    ]


# Several tables


def test_several_tables_are_read_as_one(features, table, model, tmp_path, photos):
    nopad.embed(photos / "004.png", tmp_path / "more", model=model, tokens=True, workers=1)
    both = nopad.read([table, tmp_path / "more"])
    assert both.ids == [*features.ids, "004.png"]
    assert both.tokens is None  # one of them has none
    np.testing.assert_array_equal(both.embeddings[:13], features.embeddings)
    assert both.path(13) == str(photos / "004.png")
    assert both.path(0) == features.path(0)
    assert [match.row for match in both.search(vector=both.embeddings[13], k=2)] == [features.ids.index("004.png"), 13]
    assert both.metadata["model"] == str(model)
    with pytest.raises(ValueError, match=r"'004.png' is there in 2 rows, of .*; search by vector"):
        both.search(id="004.png")
    (tmp_path / "link").symlink_to(table)
    with pytest.raises(ValueError, match=r"folder: '.*link' is named twice, and its rows would be there twice"):
        nopad.read([table, tmp_path / "link"])


def test_tokens_of_several_tables(model, tmp_path, photos):
    for name in ("003.png", "004.png"):
        nopad.embed(photos / name, tmp_path / name, model=model, tokens=True, workers=1)
    both = nopad.read([tmp_path / "003.png", tmp_path / "004.png"])
    for row in (0, 1):
        alone = nopad.read(tmp_path / both.ids[row])
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])


def test_tables_of_different_models_are_not_mixed(table, tmp_path, photos):
    other = "untrained:facebook/dinov3-vits16-pretrain-lvd1689m"
    nopad.embed(photos / "004.png", tmp_path / "other", model=other, dtype="float32", workers=1)
    with pytest.raises(ValueError, match=r"a table of another model, .* family dinov3, aimv2 in"):
        nopad.read([table, tmp_path / "other"])
    with pytest.raises(ValueError, match="folder: expected a folder or a list of them, got none"):
        nopad.read([])


# Words


@pytest.fixture(scope="module")
def described(photos, tmp_path_factory):
    """A table by a model of both towers, its encoder, and the model's folder."""
    folder = tmp_path_factory.mktemp("text")
    text_checkpoints.write(folder / "model", "siglip2 naflex")
    nopad.embed(photos, folder / "features", model=folder / "model", workers=1)
    return nopad.read(folder / "features"), folder / "model"


def test_search_by_words_is_by_the_models_own_text_tower(described):
    features, model = described
    encoder = nopad.load(model)
    expected = encoder.similarity(features.embeddings, ["a dog on a beach"])[:, 0]
    result = features.search("a dog on a beach", k=5)
    rows = [match.row for match in result]
    torch.testing.assert_close(expected[rows], expected.sort(descending=True)[0][:5], atol=1e-6, rtol=1e-6)
    assert rows.index(12) == rows.index(0) + 1  # the same image: the first row first
    scale, bias = encoder.__dict__["_text_tower"].logit_scale.exp(), encoder.__dict__["_text_tower"].logit_bias
    scores = torch.tensor([match.score for match in result])
    torch.testing.assert_close(scores * scale + bias, expected.sort(descending=True)[0][:5], atol=1e-4, rtol=1e-4)


def test_a_table_whose_model_has_no_text_tower(features):
    with pytest.raises(ValueError, match=r"has no text tower: its tensors are the vision encoder's alone"):
        features.search("a dog")


def test_a_table_of_another_model_than_the_words(features, described):
    with pytest.raises(ValueError, match=r"the table was made by .*: expected family aimv2, got siglip2"):
        features.search("a dog", encoder=described[0].encoder)


@pytest.mark.parametrize(
    "changes",
    [{"mean": (0, 0, 0), "std": (1, 1, 1)}, {"rule": "square", "size": 56}],
    ids=["statistics", "size"],
)
def test_an_image_is_searched_by_the_rule_that_made_the_table(photos, model, tmp_path, changes):
    encoder = nopad.load(model)
    encoder.preprocessing = dataclasses.replace(encoder.preprocessing, **changes)
    nopad.embed(photos, tmp_path / "table", model=encoder, workers=1)
    table = nopad.read_features(tmp_path / "table")
    assert table.metadata["size"] == ""
    photo = sorted(photos.glob("*.png"))[0]
    assert table.search(image=photo, k=1, encoder=encoder)[0].score == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"assign that rule to encoder\.preprocessing"):
        table.search(image=photo, encoder=nopad.load(model))


def test_the_checkpoints_rule_is_taken_where_another_is_assigned(features, photos, model):
    encoder = nopad.load(model)
    encoder.preprocessing = dataclasses.replace(encoder.preprocessing, mean=(0, 0, 0))
    photo = sorted(photos.glob("*.png"))[0]
    assert features.search(image=photo, k=1, encoder=encoder)[0].score == pytest.approx(1.0, abs=1e-5)

"""`nopad view` of a table: a map to explore, results, duplicates, clusters, failures."""

import base64
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import nopad
from nopad.cli import main
from nopad.view import collection as module
from nopad.view.collection import collect
from nopad.view.collection_page import collection_page
from nopad.view.projection import MAX_WIDTH, Projection, in_8_bits


@pytest.fixture(autouse=True)
def without_umap(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr("nopad.view.collection.has_umap", lambda: False)


def data_of(text):
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


def array(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_the_page_of_a_table(table, tmp_path, capsys):
    out = tmp_path / "pages" / "table.html"
    assert main(["view", str(table), "--out", str(out), "--clusters", "3", "--threshold", "0.9999"]) == 0
    assert "table.html: 11 images, 1 failure" in capsys.readouterr().out
    features = nopad.read_features(table)
    text = out.read_text(encoding="utf-8")
    data = data_of(text)
    assert data["number"] == 11
    assert [base64.b64decode(data["thumbnails"][str(row)]) for row in range(11)] == list(features.thumbnails)
    assert array(data["sizes"], "<i4").reshape(-1, 2).tolist() == features.sizes.tolist()
    labels = array(data["labels"], "u1")
    for number, group in enumerate(features.clusters(3)):
        assert (labels[group.rows] == number).all()
    assert [text.count(f"<h2>{name}</h2>") for name in ("Map", "Duplicates", "Clusters", "Failures")] == [1, 1, 1, 1]
    assert "3 groups, 3 images more than one of each" in text
    assert "not an image that Pillow can read" in text


def test_places_are_the_two_directions_of_most_variance(table):
    features = nopad.read_features(table)
    shown = collect(features)
    assert shown.places.shape == (11, 2)
    assert (shown.places.min(axis=0) >= 0).all()
    assert (shown.places.max(axis=0) <= 1).all()
    centred = features.normalized - features.normalized.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * values[:2]
    distances = lambda places: np.linalg.norm(places[:, None] - places[None], axis=2)  # noqa: E731
    ratio = distances(shown.places)[0, 1] / distances(expected)[0, 1]
    np.testing.assert_allclose(distances(shown.places), ratio * distances(expected), atol=1e-4)
    assert f"{(values[:2] ** 2).sum() / (values**2).sum():.0%} of the whole" in shown.map


def test_cosines_follow_from_the_page(table):
    features = nopad.read_features(table)
    data = data_of(collection_page(collect(features)))
    directions = array(data["directions"], "i1").reshape(11, -1).astype(np.float32)
    assert directions.shape[1] == features.embeddings.shape[1] == data["width"]
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    np.testing.assert_allclose(unit @ unit.T, features.normalized @ features.normalized.T, atol=0.02)


def test_names_and_columns_are_escaped(table, labelled, tmp_path):
    for folder in (table, labelled):
        out = tmp_path / "page.html"
        assert main(["view", str(folder), "--out", str(out)]) == 0
        text = out.read_text(encoding="utf-8")
        assert "\x1b" not in text
        assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 2
        markup = text.split('<script id="data"')[0]
        assert not re.findall(r"""<b>|(?:src|href)=["'](?![#d])|onerror="|url\(|https?://""", markup)
        assert "default-src 'none'" in markup
    columns = data_of(text)["columns"]
    assert columns == {"label": ["a </script>", "", "c", "d" * 200], "count": ["1", "2", "3", "4"]}
    assert "damaged &lt;b&gt;.jpg" in collection_page(collect(nopad.read_features(table)))


def test_results_of_queries(table, photos, tmp_path, capsys):
    query = str(photos / "005.png")
    out = tmp_path / "page.html"
    assert (
        main(["view", str(table), "--out", str(out), "--query", query, "-k", "2", "--threshold", "0.9999", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert {key: result[key] for key in ("pictures", "failures", "duplicates", "left_out")} == {
        "pictures": 11,
        "failures": 1,
        "duplicates": 3,
        "left_out": [],
    }
    text = out.read_text(encoding="utf-8")
    [results] = re.findall(r'<section id="results-0">(.*?)</section>', text, re.DOTALL)
    places = [int(place) for place in re.findall(r'data-place="(\d+)"', results)]
    expected = nopad.read_features(table).search(image=query, k=2)
    assert places == [match.row for match in expected]
    assert f"{expected[1].score:.3f}" in results


def test_images_are_bounded_and_what_is_shown_comes_first(table, labelled, photos):
    features = nopad.read_features(table)
    shown = collect(features, clusters=1, threshold=0.9999, thumbnails=3)
    assert len(shown.thumbnails) == 3
    assert set(shown.thumbnails) <= {int(row) for group in shown.duplicates for row in group.rows}
    assert "8 images, whose names are here: --thumbnails 11 takes all" in shown.left_out
    assert collect(features, thumbnails=0).thumbnails == {}
    assert len(collect(nopad.read_features(labelled)).thumbnails) == 4  # read from the Parquet file
    with pytest.raises(ValueError, match="thumbnails: expected ≥ 0, got -1"):
        collect(features, thumbnails=-1)


def test_images_that_are_no_longer_there(photos, model, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    nopad.embed(folder, tmp_path / "features", model=model, workers=1)
    (folder / "003.png").unlink()
    shown = collect(nopad.read_features(tmp_path / "features"))
    assert len(shown.thumbnails) == 10
    assert any(
        line.startswith("1 image could not be read again, the first for this reason: cannot be read")
        for line in shown.left_out
    )


def test_of_a_large_table_a_part_is_on_the_map_with_all_that_is_shown(table, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 9)
    features = nopad.read_features(table)
    shown = collect(features, clusters=1)
    assert len(shown.rows) == len(set(shown.rows)) == 9
    galleries = {int(row) for group in shown.duplicates for row in group.rows}
    galleries |= {int(row) for row in shown.clusters[0].rows[: module.CLUSTER_SHOWN]}
    assert galleries <= set(shown.rows.tolist())
    assert "the map shows 9 images of 11, chosen at random" in shown.left_out
    text = collection_page(shown)
    data = data_of(text)
    assert len(data["ids"]) == 9
    for place, name in re.findall(r'data-place="(\d+)"><div>(\d+\.png)', text):
        assert data["ids"][int(place)] == name


def test_what_costs_too_much_or_is_not_installed_has_its_reason_on_the_page(table, monkeypatch):
    monkeypatch.setattr(module, "MAX_PAIRED_ROWS", 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "has_faiss", lambda: False)
    features = nopad.read_features(table)
    shown = collect(features)
    assert (shown.clusters, shown.duplicates) == (None, None)
    assert [line.split(",")[0] for line in shown.left_out] == ["clusters", "duplicates"]
    text = collection_page(shown)
    assert "Not on this page: clusters, which need faiss-cpu" in text
    assert data_of(text)["labels"] == base64.b64encode(b"\xff" * 11).decode()
    assert len(collect(features, threshold=0.9999).duplicates) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "pca"], "--kind: is for images; '{table}' is a table"),
        (["--device", "cpu"], "--device: is for images"),
        (["--attention", "sdpa"], "--attention: is for images"),
        (["--clusters", "12"], "k: expected at most the table's 11 rows, got 12"),
        (["--clusters", "251"], "clusters: expected at most 250 on a page, got 251"),
        (["--threshold", "2"], "threshold: expected a cosine above 0, at most 1, got 2"),
        (["--out", "view.png"], "--out: expected a file .html, got 'view.png'"),
        (["--map", "umap"], "a map by UMAP needs umap-learn: pip install umap-learn"),
        (["--query", "a dog"], "checkpoint"),
        (["-k", "3"], "-k: expected a --query whose results it counts, got none"),
        (["--model", "x"], "--model: a table is shown without its model unless there is a --query"),
        (["picture.png"], "SOURCE: expected images or folders of tables, got 'picture.png' beside '{table}'"),
    ],
)
def test_tables_are_not_shown_by_wrong_options(table, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nopad.view.projection.has_umap", lambda: False)
    assert main(["view", str(table), *options]) == 2
    assert message.format(table=table) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--query", "a"], ["-k", "3"], ["--threshold", "0.9"], ["--thumbnails", "3"]])
def test_images_are_not_shown_by_options_for_tables(photos, model, option, capsys):
    assert main(["view", str(photos / "000.png"), "--model", str(model), *option]) == 2
    assert f"{option[0]}: is for tables; SOURCE names no folder or address" in capsys.readouterr().err
    assert main(["view", str(photos / "000.png")]) == 2
    assert "--model: expected the models that see the images" in capsys.readouterr().err


def test_the_default_page_replaces_pages_alone(table, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(table)]) == 0
    assert main(["view", str(table)]) == 0  # its own of before
    Path("view.html").write_text("<title>mine</title>")
    capsys.readouterr()
    assert main(["view", str(table)]) == 2
    message = "nopad view: --out: view.html is there and no page of nopad; name another file"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert Path("view.html").read_text() == "<title>mine</title>"
    assert main(["view", str(table), "--out", "view.html"]) == 0


def test_a_folder_that_is_no_table(photos, tmp_path, capsys):
    assert main(["view", str(photos), "--out", str(tmp_path / "x.html")]) == 2
    assert "has no shards: expected shard-….parquet files" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_bytes(b"no image")


def test_a_table_of_failures_alone(model, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_bytes(b"no image")
    nopad.embed(tmp_path / "none", tmp_path / "features", model=model, workers=1)
    with pytest.raises(ValueError, match=r"the table has no rows to show; nopad.read_features\(FOLDER\).failures"):
        collect(nopad.read_features(tmp_path / "features"))


def test_a_table_of_one_image(photos, model, tmp_path):
    nopad.embed(photos / "000.png", tmp_path / "features", model=model, workers=1)
    shown = collect(nopad.read_features(tmp_path / "features"))
    assert shown.places.tolist() == [[0.5, 0.5]]
    assert shown.clusters is None
    collection_page(shown)


def test_a_map_by_umap(table, monkeypatch):
    made = []

    class Umap:
        def __init__(self, **options):
            made.append(options)

        def fit_transform(self, vectors):
            made.append(vectors)
            return np.stack([np.arange(len(vectors)), np.zeros(len(vectors))], axis=1) * 3.0

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    for name in ("collection", "projection"):
        monkeypatch.setattr(f"nopad.view.{name}.has_umap", lambda: True)
    shown = collect(nopad.read_features(table))
    assert shown.map.startswith("UMAP")
    options, vectors = made
    assert (options["random_state"], options["metric"], options["n_neighbors"]) == (0, "cosine", 10)
    assert vectors.shape == (11, 32)
    np.testing.assert_allclose(shown.places[:, 0], np.linspace(0, 1, 11), atol=1e-6)
    assert (shown.places[:, 1] == 0.5).all()
    assert collect(nopad.read_features(table), map="pca").map.startswith("Principal components")


def test_wide_vectors_are_narrowed_at_random():
    rows = np.random.default_rng(0).normal(size=(20, MAX_WIDTH + 500)).astype(np.float32)
    rows[10:] = rows[:10] + 0.3 * rows[10:]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    result = in_8_bits(Projection.of(rows).strongest(MAX_WIDTH)).astype(np.float32)
    result /= np.linalg.norm(result, axis=1, keepdims=True)
    np.testing.assert_allclose(result @ result.T, unit @ unit.T, atol=0.1)


def test_rows_of_zeros_stay_zeros():
    assert in_8_bits(Projection.of(np.zeros((3, 4), np.float32)).strongest(4)).tolist() == [[0] * 4] * 3
    assert in_8_bits(np.zeros((0, 4), np.float32)).shape == (0, 4)


def test_every_row_that_is_shown_elsewhere_is_on_the_map(monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert module._chosen(9, [7, 1, 3, 5]).tolist() == [1, 3, 5, 7]
    assert {7, 1} < {*module._chosen(9, [7, 1]).tolist()}

"""`nopad search`, `duplicates`, `clusters` and `index`."""

import json
import shutil

import pytest
from pictures import write_video

import nopad
from nopad.cli import main
from nopad.search.query import Match


def test_search_prints_images_best_first(table, photos, capsys):
    assert main(["search", str(table), "--id", "000.png", "-k", "2"]) == 0
    header, best, _second = capsys.readouterr().out.splitlines()
    assert header.split() == ["cosine", "image"]
    assert best.split() == ["1.000", str(photos / "copy.png")]


def test_a_query_that_is_a_file_is_an_image(table, photos, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["search", str(table), str(photos / "004.png"), "-k", "3", "--json", "--html", str(page)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["query"] == {"image": str(photos / "004.png")}
    assert [match.keys() for match in content["matches"]] == [{"id", "source", "score", "path"}] * 3
    assert content["matches"][0]["id"] == "004.png"
    assert page.read_text().count("data:image/jpeg;base64,") == 3


def test_the_model_may_have_moved(table, photos, model, capsys, tmp_path):
    shutil.copytree(model, tmp_path / "moved")
    assert main(["search", str(table), str(photos / "004.png"), "--model", str(tmp_path / "moved")]) == 0
    assert "004.png" in capsys.readouterr().out.splitlines()[1]


def test_duplicates_and_clusters(table, photos, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["duplicates", str(table), "--threshold", "0.99999", "--html", str(page)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "1 group of nearly the same image, 1 image more than one of each"
    assert sorted(out[3:]) == [f"  {photos}/000.png", f"  {photos}/copy.png"]
    assert page.read_text().count("data:image/jpeg") == 2
    assert main(["clusters", str(table), "-k", "3", "--json", "--html", str(page)]) == 0
    clusters = json.loads(capsys.readouterr().out)["clusters"]
    assert sum(map(len, clusters)) == 13
    assert page.read_text().count("data:image/jpeg") == 13


def test_index(table, capsys, tmp_path):
    shutil.copytree(table, tmp_path / "table")
    assert main(["index", str(tmp_path / "table"), "--recall", "1"]) == 0
    assert capsys.readouterr().out.endswith("an index of 13 rows, recall at 10 1.000, looks into 1 of 1 lists\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "QUERY: expected words, the path of an image, or one of --text, --image, --id, got none"),
        (["dog", "--id", "a"], "got 2: query, id"),
        ([" "], "QUERY: expected words or the path of an image, got ' '"),
        (["dog", "-k", "0"], "k: expected ≥ 1, got 0"),
        (["--image", "gone.jpg"], "gone.jpg"),
        (["photos/gone.JPG"], "QUERY: there is no file 'photos/gone.JPG'; --text searches for words"),
        (["--id", "gone.jpg"], "no row of this table is called 'gone.jpg'"),
        (["--image", "s3://bucket/a.jpg"], "expected a path of this machine"),
        (["dog", "--html", "/proc/page.html"], "--report: expected a file that can be written"),
    ],
)
def test_wrong_use_is_an_error_of_one_line(table, arguments, message, capsys):
    assert main(["search", str(table), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_no_table(tmp_path, capsys):
    assert main(["search", str(tmp_path), "dog"]) == 2
    assert "has no shards: expected shard-….parquet files" in capsys.readouterr().err
    assert main(["duplicates", str(tmp_path / "gone")]) == 2
    assert "does not exist, expected the folder given to `nopad embed --out`" in capsys.readouterr().err


def test_names_are_escaped_on_pages_and_terminals(photos, model, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    names = ["<script>alert(1)</script>.png".replace("/", "∕"), "\x1b[31mred\x1b[0m\nline.png", '" onerror="x.png']
    for name in names:
        shutil.copy(photos / "000.png", folder / name)
    nopad.embed(folder, tmp_path / "table", model=model, workers=1)
    page = tmp_path / "page.html"
    for command in (["duplicates"], ["clusters", "-k", "1"], ["search", "--id", names[0]]):
        command[1:1] = [str(tmp_path / "table")]
        assert main([*command, "--html", str(page)]) == 0
        out, html = capsys.readouterr().out, page.read_text()
        assert "\x1b" not in out + html
        assert "\\x1b[31mred" in out
        assert "\\x1b[31mred" in html
        assert "<script" not in html
        assert '" onerror' not in html


def test_no_cosine_is_minus_zero(table, features, tmp_path, capsys, monkeypatch):
    match = Match(0, "a.png", "photos", -0.0001)
    monkeypatch.setattr(nopad.Features, "search", lambda *arguments, **options: [match])
    out = tmp_path / "page.html"
    assert main(["search", str(table), features.path(0), "--html", str(out)]) == 0
    assert "-0.000" not in capsys.readouterr().out
    assert "-0.000" not in out.read_text(encoding="utf-8")


def test_a_part_of_a_video_is_named_by_its_time(model, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    write_video(tmp_path / "films/film.mp4", 75)  # of 25 a second
    nopad.embed(tmp_path / "films", tmp_path / "table", model=model, fps=1, workers=1)
    assert main(["search", str(tmp_path / "table"), "--id", "film.mp4#t=1", "-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    names = {line.split(maxsplit=1)[1] for line in lines}
    assert names == {f"{tmp_path}/films/film.mp4#t={second}" for second in (0, 2)}

"""Sources that change after a job began."""

import tarfile
from pathlib import Path

import pytest
from jobs import embed, errors, table
from pictures import write_photos
from PIL import Image

import nopad
from nopad.embedding import table_run
from nopad.embedding.inputs import parts
from nopad.embedding.inputs.changes import changes_of
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.listing import Input, InputList


def test_a_source_that_grows_and_shrinks_is_reported_and_the_list_is_kept(photos, tmp_path, caplog, model, stop_after):
    embed(photos, tmp_path / "whole", model)
    embed(photos, tmp_path / "out", model, **stop_after(1))
    write_photos(photos, 2, start=50)
    (photos / "011.png").unlink()
    summary = embed(photos, tmp_path / "out", model)
    message = (
        "since this job began, its sources have 2 new inputs and 1 is gone; it keeps to the list that it began with"
    )
    assert len(summary.changes) == 1
    assert summary.changes[0].startswith(message)
    assert message in caplog.text
    assert (summary.rows, summary.failed) == (12, 1)
    assert errors(tmp_path / "out") == {"011.png": "cannot be read: No such file or directory"}
    whole, out = table(tmp_path / "whole"), table(tmp_path / "out")
    assert [whole[name] == out[name] for name in whole] == [True, True, False]


def test_a_list_in_another_order_is_reported(photos, tmp_path, model):
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


def test_long_lists_are_compared_in_parts(monkeypatch):
    def of(numbers, offset: int = 0) -> InputList:
        tars = [(f"{i}.tar", "tar", b"/%d.tar" % i) for i in range(3)]
        return InputList.of(Input(f"{i}.jpg", *tars[i % 3], i + offset, 1) for i in numbers)

    now = of([*range(7, 60), 7, 7])
    whole = changes_of(of(range(50)), now, "out")
    assert "12 new inputs and 7 are gone" in whole
    moved = r"43 inputs are elsewhere now; the first is 7\.jpg of 1\.tar: /1\.tar at byte 7, 1 bytes there, .* byte 8"
    with pytest.raises(ValueError, match=moved):
        changes_of(of(range(50)), of(range(7, 60), offset=1), "out")
    monkeypatch.setattr(parts, "PART", 8)
    assert changes_of(of(range(50)), now, "out") == whole
    assert "but they come in another order" in changes_of(of(range(50)), of(range(49, -1, -1)), "out")
    assert "50 new inputs" in changes_of(of([]), of(range(50)), "out")
    with pytest.raises(ValueError, match=moved):
        changes_of(of(range(50)), of(range(7, 60), offset=1), "out")


def test_an_image_that_vanishes_between_listing_and_reading(photos, tmp_path, monkeypatch, model):
    def list_inputs(*arguments, **options):
        listing = real(*arguments, **options)
        (photos / "004.png").unlink()
        return listing

    real = table_run.list_inputs
    monkeypatch.setattr(table_run, "list_inputs", list_inputs)
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

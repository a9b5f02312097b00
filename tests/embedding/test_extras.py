"""What is kept of files beside features on request: thumbnails, and the EXIF's time and place."""

import base64
import io
from datetime import datetime

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pictures import write_video
from PIL import Image

import nopad
from nopad.embedding.inputs.extras import TYPES, values_of
from nopad.preprocessing.exif import read_exif
from nopad.preprocessing.thumbnails import MAX_BYTES, is_thumbnail, thumbnail
from nopad.preprocessing.video import read_frames
from nopad.search.thumbnails import thumbnail_of

PLACE = {1: "S", 2: (33.0, 51.0, 30.0), 3: "E", 4: (151.0, 12.0, 36.0)}


def photo(*, taken="2024:05:01 12:30:00", place=PLACE, orientation=1, size=(40, 24), format="JPEG"):
    """An image, red on its left half and blue on its right, with an EXIF."""
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    if taken is not None:
        exif.get_ifd(0x8769)[0x9003] = taken
    exif.get_ifd(0x8825).update(place)
    file = io.BytesIO()
    image.save(file, format, exif=exif, quality=95)
    return file.getvalue()


@pytest.fixture
def album(tmp_path):
    """A photo on its side, one without EXIF, one that is damaged."""
    folder = tmp_path / "album"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo(orientation=6, size=(400, 240)))
    Image.new("RGB", (300, 200), "green").save(folder / "b.png")
    (folder / "c.jpg").write_bytes(b"no image")
    return folder


def test_neither_is_kept_unless_requested(album, model, tmp_path):
    nopad.embed(album, tmp_path / "table", model=model, workers=1)
    features = nopad.read_features(tmp_path / "table")
    assert features.thumbnails is None
    assert features.columns.column_names == []
    assert b"2024" not in b"".join(path.read_bytes() for path in (tmp_path / "table").glob("*.parquet"))


def test_thumbnails_are_upright_and_bounded(album, model, tmp_path):
    nopad.embed(album, tmp_path / "table", model=model, thumbnails=64, workers=1)
    features = nopad.read_features(tmp_path / "table")
    assert (features.ids, len(features.thumbnails)) == (["a.jpg", "b.png"], 2)
    assert features.columns.column_names == []  # they stay on the disk
    turned, green = (Image.open(io.BytesIO(data)) for data in features.thumbnails)
    assert (turned.format, turned.size, green.size) == ("JPEG", (38, 64), (64, 43))
    assert turned.getpixel((19, 5))[0] > 200  # red is above, as one sees it
    assert turned.getpixel((19, 58))[2] > 200
    assert not turned.getexif()
    assert features.thumbnails[-2:] == [features.thumbnails[0], features.thumbnails[1]]
    with pytest.raises(IndexError, match="thumbnail index 2, expected -2 to 1"):
        features.thumbnails[2]
    rows = duckdb.sql(f"select id, octet_length(thumbnail) from '{tmp_path}/table/*.parquet' order by id").fetchall()
    assert rows == [("a.jpg", len(features.thumbnails[0])), ("b.png", len(features.thumbnails[1])), ("c.jpg", None)]


def test_pages_show_the_tables_own_thumbnails(album, model, tmp_path):
    nopad.embed(album, tmp_path / "table", model=model, thumbnails=64, workers=1)
    features = nopad.read_features(tmp_path / "table")
    (album / "a.jpg").unlink()
    assert thumbnail_of(features, 0) == (features.thumbnails[0], "")


def test_exif_gives_time_and_place(album, model, tmp_path):
    nopad.embed(album, tmp_path / "table", model=model, exif=True, workers=1)
    features = nopad.read_features(tmp_path / "table")
    assert features.thumbnails is None
    row, without = features[0], features[1]
    assert row["taken"] == datetime(2024, 5, 1, 12, 30)
    assert (row["latitude"], row["longitude"]) == (pytest.approx(-33.85833333), pytest.approx(151.21))
    assert (without["taken"], without["latitude"], without["longitude"]) == (None, None, None)
    assert features.to_pandas()["taken"].dt.year.tolist()[0] == 2024


def test_both_stand_behind_what_is_kept_of_the_data(model, tmp_path):
    data = {"image": [photo(), photo(taken=None, place={})], "thumbnail": ["own", "another"], "taken": [1, 2]}
    pq.write_table(pa.table(data), tmp_path / "data.parquet")
    options = {"keep": "all", "image_column": "image", "thumbnails": 32, "exif": True}
    nopad.embed(tmp_path / "data.parquet", tmp_path / "table", model=model, workers=1, **options)
    features = nopad.read_features(tmp_path / "table")
    columns = ["kept_thumbnail", "kept_taken", "taken", "latitude", "longitude"]
    assert features.columns.column_names == columns
    assert [[row[name] for name in columns[:3]] for row in features] == [
        ["own", 1, datetime(2024, 5, 1, 12, 30)],
        ["another", 2, None],
    ]
    assert is_thumbnail(features.thumbnails[1])


def test_a_kept_column_may_be_called_thumbnail(model, tmp_path):
    pq.write_table(pa.table({"image": [photo()], "thumbnail": ["own"]}), tmp_path / "data.parquet")
    options = {"keep": "all", "image_column": "image"}
    nopad.embed(tmp_path / "data.parquet", tmp_path / "table", model=model, workers=1, **options)
    features = nopad.read_features(tmp_path / "table")
    assert (features.thumbnails, features[0]["thumbnail"]) == (None, "own")


def test_updates_keep_them_and_take_away_those_of_what_is_gone(album, model, tmp_path):
    options = {"model": model, "thumbnails": 64, "exif": True, "workers": 1}
    nopad.embed(album, tmp_path / "table", **options)
    before = nopad.read_features(tmp_path / "table")
    kept = before.thumbnails[1]
    (album / "a.jpg").unlink()
    (album / "d.jpg").write_bytes(photo(taken="2025:01:01 00:00:00"))
    nopad.embed(album, tmp_path / "table", update=True, **options)
    after = nopad.read_features(tmp_path / "table")
    assert after.ids == ["b.png", "d.jpg"]
    assert after.thumbnails[0] == kept
    assert is_thumbnail(after.thumbnails[1])
    assert [row["taken"] and row["taken"].year for row in after] == [None, 2025]
    [gone] = duckdb.sql(
        f"select thumbnail, taken, latitude from '{tmp_path}/table/*.parquet' where status = 'gone'"
    ).fetchall()
    assert gone == (None, None, None)


def test_a_shard_that_is_marked_keeps_its_times(album, model, tmp_path):
    """Parquet stores milliseconds, whatever unit is written."""
    nopad.embed(album, tmp_path / "table", model=model, workers=1, exif=True)
    before = nopad.read_features(tmp_path / "table").columns["taken"][0]
    (album / "b.png").unlink()
    nopad.embed(album, tmp_path / "table", model=model, workers=1, exif=True, update=True)
    features = nopad.read_features(tmp_path / "table")
    assert features.ids == ["a.jpg"]
    assert features.columns["taken"].to_pylist() == [before.as_py()]
    assert before.as_py() is not None


def test_rows_that_are_tried_again_have_them(album, model, tmp_path):
    nopad.embed(album, tmp_path / "table", model=model, thumbnails=64, workers=1)
    (album / "c.jpg").write_bytes(photo())
    nopad.embed(album, tmp_path / "table", model=model, thumbnails=64, workers=1, retry_failed=True)
    features = nopad.read_features(tmp_path / "table")
    assert [is_thumbnail(data) for data in features.thumbnails] == [True, True, True]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {"thumbnails": 64}, "thumbnails: none there, 64 now"),
        ({"thumbnails": 64}, {"thumbnails": 32}, "thumbnails: 64 there, 32 now"),
        ({}, {"exif": True}, "exif: no there, yes now"),
    ],
)
def test_a_job_goes_on_with_the_same_alone(album, model, tmp_path, first, second, expected):
    nopad.embed(album, tmp_path / "table", model=model, workers=1, **first)
    with pytest.raises(ValueError, match=expected):
        nopad.embed(album, tmp_path / "table", model=model, workers=1, **second)


@pytest.mark.parametrize("thumbnails", [15, 513, True, 64.0, "64"])
def test_sides_that_are_none(album, model, tmp_path, thumbnails):
    with pytest.raises(ValueError, match="thumbnails: expected pixels from 16 to 512, got"):
        nopad.embed(album, tmp_path / "table", model=model, thumbnails=thumbnails)


def test_of_a_video_the_frame_in_the_middle_of_each_row(model, tmp_path):
    video = write_video(tmp_path / "video.mp4", 50)
    nopad.embed(video, tmp_path / "table", model=model, every=1, frames=3, thumbnails=32, workers=1)
    features = nopad.read_features(tmp_path / "table")
    frames = read_frames(video, 50)
    assert features.thumbnails[:] == [thumbnail(frames[12], 32), thumbnail(frames[37], 32)]
    assert features.columns.column_names == ["time"]


def test_the_largest_thumbnail_is_within_its_bound():
    noise = torch.randint(0, 256, (3, 600, 600), dtype=torch.uint8)
    data = thumbnail(noise, 512)
    assert is_thumbnail(data)
    assert 4 * len(data) < 3 * (1 << 20) * 0.9  # an answer of a decode process, in base64, has room for it


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "no base64!",
        base64.b64encode(b"<svg onload=alert(1)>").decode(),
        base64.b64encode(b"\xff\xd8\xff" + bytes(MAX_BYTES)).decode(),
        {"a": 1},
    ],
)
def test_what_a_decoder_sends_is_not_trusted(value):
    assert values_of({"thumbnail": value}, ["thumbnail"]) == (None,)
    assert values_of({"thumbnail": value, "taken": value, "latitude": value}, list(TYPES))[0] is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 90.5, -91, True, "12", [1]])
def test_places_that_are_none_are_left_out(value):
    assert values_of({"latitude": value}, ["latitude"]) == (None,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"taken": "0000:00:00 00:00:00"}, ["latitude", "longitude"]),
        ({"taken": "    "}, ["latitude", "longitude"]),
        ({"place": {}}, ["taken"]),
        ({"place": {**PLACE, 2: (91.0, 0.0, 0.0)}}, ["taken"]),
        ({"place": {**PLACE, 2: (33.0, 51.0)}}, ["taken"]),
        ({"place": {**PLACE, 1: "X"}}, ["taken"]),
        ({"place": {key: PLACE[key] for key in (1, 2)}}, ["taken"]),
        ({"format": "PNG"}, ["taken", "latitude", "longitude"]),
        ({"format": "WEBP"}, ["taken", "latitude", "longitude"]),
    ],
    ids=str,
)
def test_exif_that_is_damaged_is_left_out(changes, expected):
    assert list(read_exif(photo(**changes))) == expected


@pytest.mark.parametrize("cut", [b"", b"\xff\xd8", b"no image"])
def test_files_without_exif(cut):
    assert read_exif(cut) == {}
    whole = photo()
    assert isinstance(read_exif(whole[: len(whole) // 3]), dict)

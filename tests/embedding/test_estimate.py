import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import write_video
from PIL import Image

import nopad
from nopad.embedding import estimate
from nopad.embedding.estimate import mean_patches
from nopad.embedding.inputs.decoder import Reader
from nopad.embedding.inputs.media import MediaDecoder
from nopad.embedding.inputs.sources import list_inputs
from nopad.pipeline.image_processor import ImageProcessor


def write_pictures(folder, sizes):
    folder.mkdir(exist_ok=True)
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(folder / f"{number:05}.png")


def mean(source, model, **options):
    image_processor = ImageProcessor.of(nopad.load(model, **options))
    with Reader(MediaDecoder(frames=4, max_pixels=100_000)) as reader:
        return mean_patches(list_inputs([source]).inputs, reader, image_processor)


def test_mean_patches_are_those_of_the_rule(tmp_path, model, clip_model):
    write_pictures(tmp_path / "a", [(40, 80), (80, 40), (41, 43), (400, 40)])
    assert mean(tmp_path / "a", model) == (200 + 200 + 100 + 1000) / 4
    assert mean(tmp_path / "a", model, max_patches=200) == pytest.approx((200 + 200 + 100 + 4 * 44) / 4)
    assert mean(tmp_path / "a", clip_model) == 49


def test_headers_that_cannot_be_read_do_not_count(tmp_path, model):
    write_pictures(tmp_path / "a", [(40, 80), (40, 40), (2000, 2000)])  # the last is refused for its pixels
    (tmp_path / "a" / "x.png").write_bytes(b"no image")
    (tmp_path / "a" / "y.png").touch()
    Image.new("RGB", (40, 60)).save(tmp_path / "a" / "z.png")
    assert mean(tmp_path / "a", model) == 150
    for path in (*(tmp_path / "a").glob("0*.png"), tmp_path / "a" / "z.png"):
        path.unlink()
    assert mean(tmp_path / "a", model) is None


def test_video_counts_all_frames_that_are_taken(tmp_path, model):
    write_video(tmp_path / "a.mp4", 9)  # 64 × 32 pixels
    assert mean(tmp_path / "a.mp4", model) == 4 * 16 * 8


def test_sample_is_spread_over_the_list(tmp_path, model, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_HEADERS", 4)
    write_pictures(tmp_path / "a", [(4 * (number + 1), 4) for number in range(16)])
    assert mean(tmp_path / "a", model) == (3 + 7 + 11 + 15) / 4


def test_sample_of_a_table_is_from_its_first_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "MAX_HEADERS", 4)
    for name in "ab":
        pq.write_table(pa.table({"image": [b"picture"] * 100}), tmp_path / f"{name}.parquet")
    assert estimate._places(list_inputs([tmp_path]).inputs) == [0, 1, 102, 103]

"""Rows for the frames and windows of a video."""

import pickle

import numpy as np
import pytest
import torch
from pictures import write_photos, write_video

import nopad
from nopad.cli import main
from nopad.embedding.inputs import spans as module
from nopad.embedding.inputs.media import Video
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.video import read_frames
from nopad.preprocessing.video_file import duration_seconds


@pytest.fixture
def video(tmp_path):
    """Two seconds of 25 frames each, from dark to light."""
    (tmp_path / "videos").mkdir()
    return write_video(tmp_path / "videos" / "a.mp4", 50)


def embed(source, out, model, **options) -> nopad.Features:
    nopad.embed(source, out, model=model, workers=1, **options)
    return nopad.read(out)


def test_a_row_for_each_frame_with_its_time(video, model, tmp_path):
    features = embed(video.parent, tmp_path / "out", model, fps=2)
    assert features.ids == [f"a.mp4#t={time}" for time in ("0", "0.5", "1", "1.5")]
    assert [row["time"] for row in features] == [0.0, 0.5, 1.0, 1.5]
    assert features.grids[:, 0].tolist() == [1] * 4
    assert features.path(3) == str(video)
    frames = read_frames(video, 50)
    encoder = nopad.load(model)
    expected = encoder.embed([frames[index] for index in (0, 12, 25, 37)])
    torch.testing.assert_close(torch.tensor(features.embeddings), expected, rtol=0, atol=1e-5)


def test_a_row_for_each_window_with_frames_spread_over_it(video, model, tmp_path):
    features = embed(video, tmp_path / "out", model, every=0.8, frames=2)
    assert features.ids == ["a.mp4#t=0,0.8", "a.mp4#t=0.8,1.6", "a.mp4#t=1.6,2"]
    assert features.columns["time"].to_pylist() == [0.0, 0.8, 1.6]
    assert features.grids[:, 0].tolist() == [2] * 3
    frames = read_frames(video, 50)
    clips = [frames[[5, 15]], frames[[25, 35]], frames[[42, 47]]]
    expected = nopad.load(model).embed(clips)
    torch.testing.assert_close(torch.tensor(features.embeddings), expected, rtol=0, atol=1e-5)


def test_images_beside_videos_have_no_time(video, model, tmp_path):
    write_photos(video.parent, 2)
    features = embed(video.parent, tmp_path / "out", model, fps=1)
    assert list(zip(features.ids, features.columns["time"].to_pylist(), strict=True)) == [
        ("000.png", None),
        ("001.png", None),
        ("a.mp4#t=0", 0.0),
        ("a.mp4#t=1", 1.0),
    ]


def test_a_video_that_was_replaced_is_made_again(video, model, tmp_path):
    embed(video.parent, tmp_path / "out", model, fps=1)
    write_video(video, 80)
    summary = nopad.embed(video.parent, tmp_path / "out", model=model, workers=1, fps=1, update=True)
    assert summary.changes == ["in the sources 2 are new, 2 have changed, 0 are gone"]
    assert nopad.read(tmp_path / "out").columns["time"].to_pylist() == [0.0, 1.0, 2.0, 3.0]


def test_an_encoder_takes_videos_by_path(video, model):
    encoder = nopad.load(model)
    frames = read_frames(video, 8)
    assert torch.equal(encoder.embed([video]), encoder.embed([frames]))
    assert encoder.pack([str(video)]).grid_thw.tolist() == [[8, 8, 16]]
    with pytest.raises(ImageError, match="cannot be read"):
        encoder.embed([video.with_name("gone.mp4")])


def test_what_is_no_video_or_too_long_is_a_failed_row(video, model, tmp_path, monkeypatch):
    video.with_name("b.mp4").write_bytes(b"no video")
    features = embed(video.parent, tmp_path / "out", model, fps=1)
    assert [(failure.id, failure.error) for failure in features.failures] == [
        ("b.mp4", "a video whose header does not say how long it is, or damaged")
    ]
    write_photos(video.parent, 1)
    monkeypatch.setattr(module, "MAX_SPANS", 1)
    features = embed(video.parent, tmp_path / "long", model, fps=1)
    assert features.failures[0].error == "2 s by its header, 2 rows; expected at most 1"


def test_a_header_that_claims_more_than_there_is(video):
    assert duration_seconds(video) == 2.0
    with pytest.raises(ImageError, match=r"its last frame begins at 1\.96 s, none at 2\.5 s"):
        read_frames(video, 1, span=(2.5, 2.5))
    with pytest.raises(ImageError, match=r"no frame begins from 3 to 4 s"):
        read_frames(video, 1, span=(3, 4))
    assert read_frames(video, 3, span=(1.9, 4)).shape[0] == 2


def test_a_moment_shows_the_frame_before_it(video):
    frames = read_frames(video, 50)
    for seconds, index in ((0, 0), (0.039, 0), (0.04, 1), (1.0, 25), (1.99, 49)):
        np.testing.assert_array_equal(read_frames(video, 8, span=(seconds, seconds))[0], frames[index])


def test_parts_go_to_other_processes():
    part = pickle.loads(pickle.dumps(Video.of("a.mp4", (1.5, 2.0), b"/videos")))
    assert (part, part.span, part.root, type(part)) == ("a.mp4", (1.5, 2.0), b"/videos", Video)


def test_the_options(video, model, tmp_path, capsys):
    command = ["embed", str(video), "--model", str(model), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, "--every", "1000ms"]) == 0
    assert "2 embedded, 0 failed" in capsys.readouterr().out
    assert nopad.read(tmp_path / "out").ids == ["a.mp4#t=0,1", "a.mp4#t=1,2"]
    assert main([*command, "--fps", "1", "--every", "2s"]) == 2
    assert "fps, every: expected one of them, got 1.0 and 2.0" in capsys.readouterr().err
    assert main([*command, "--fps", "0"]) == 2
    assert "fps: expected a number per second, 1e-08 to 1e+06, got 0.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--every", "2 weeks"])
    assert "expected a time as 2s, 500ms or 1m, got '2 weeks'" in capsys.readouterr().err

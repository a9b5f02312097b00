"""Frames of videos."""

import io
import os
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from encoded_videos import encoded_video, numbers
from PIL import Image

from nopad.preprocessing import video, video_file
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.video import read_frames


def test_frames_are_the_middles_of_equal_spans_in_the_order_shown():
    frames = read_frames(encoded_video(40), 4)
    assert frames.dtype == torch.uint8
    assert frames.shape == (4, 3, 32, 64)
    assert numbers(frames) == [5, 15, 25, 35]  # libx264 stores B-frames out of this order


def test_a_video_of_fewer_frames_gives_all():
    assert numbers(read_frames(encoded_video(3), 8)) == [0, 1, 2]
    assert numbers(read_frames(encoded_video(1), 8)) == [0]


@pytest.mark.parametrize(
    ("format", "codec"), [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpeg", "mpeg2video")]
)
def test_the_count_needs_no_header(format: str, codec: str):
    assert numbers(read_frames(encoded_video(30, format, codec), 3)) == [5, 15, 25]


def test_key_frames_are_used_and_change_nothing(monkeypatch: pytest.MonkeyPatch):
    data = encoded_video(40)
    decoded = 0
    upright = video._upright

    def count(*arguments):
        nonlocal decoded
        decoded += 1
        return upright(*arguments)

    monkeypatch.setattr(video, "_decode", None)  # what reads from the start
    monkeypatch.setattr(video, "_upright", count)
    over_keys = read_frames(data, 8)
    assert decoded == 8  # only requested frames become arrays
    monkeypatch.undo()
    monkeypatch.setattr(video, "_seek", lambda *_: None)
    assert torch.equal(read_frames(data, 8), over_keys)


def test_where_packets_are_no_frames_the_decoded_ones_count(monkeypatch: pytest.MonkeyPatch):
    data = encoded_video(20)
    monkeypatch.setattr(video, "_scan", lambda *_: video._Index(50, None, []))
    assert numbers(read_frames(data, 2)) == [5, 15]


@pytest.mark.parametrize(("rotation", "dark"), [(90, (1, 0)), (-90, (0, 1)), (180, (1, 1))])
def test_a_turned_video_comes_upright(rotation: int, dark: tuple[int, int]):
    frames = read_frames(encoded_video(2, rotation=rotation), 1)
    assert frames.shape[2:] == ((64, 32) if abs(rotation) == 90 else (32, 64))
    quarters = frames[0].float().mean(0).unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))
    assert divmod(int(quarters.argmin()), 2) == dark


@pytest.mark.parametrize(("format", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "mpeg4")])
@pytest.mark.parametrize(
    ("ratio", "rotation", "expected"),
    [
        (Fraction(3, 2), 0, (32, 96)),
        (Fraction(1, 2), 0, (64, 64)),
        (Fraction(3, 2), 90, (96, 32)),
        (Fraction(1), 0, (32, 64)),
    ],
)
def test_pixels_that_are_not_square_become_square(format, codec, ratio, rotation, expected):
    if rotation and format != "mp4":
        pytest.skip("no display matrix in this container")
    data = encoded_video(20, format, codec, pixel_ratio=ratio, rotation=rotation)
    frames = read_frames(data, 2)
    assert frames.shape == (2, 3, *expected)
    assert numbers(frames) == pytest.approx([5, 15], abs=1)  # FFmpeg's resize is 2 grey levels off
    quarters = frames[0].float().mean(0).unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))
    assert divmod(int(quarters.argmin()), 2) == ((1, 0) if rotation else (0, 0))
    assert video_file.frame_size(data) == (expected if rotation else expected[::-1])


def test_the_limit_is_of_square_pixels():
    with pytest.raises(ImageError, match="frames of 96×32 are 3072 pixels, expected at most 3071"):
        read_frames(encoded_video(2, pixel_ratio=Fraction(3, 2)), 2, max_pixels=3071)


def test_reading_is_deterministic_and_the_same_from_a_path(tmp_path: Path):
    data = encoded_video(40)
    (tmp_path / "a:b.mp4").write_bytes(data)
    assert torch.equal(read_frames(tmp_path / "a:b.mp4", 5), read_frames(data, 5))


@pytest.mark.parametrize("script", ["ffconcat version 1.0\nfile clip.mp4\n", "#EXTM3U\n#EXTINF:1,\nclip.mp4\n"])
def test_no_other_file_is_opened(tmp_path: Path, script: str):
    (tmp_path / "clip.mp4").write_bytes(encoded_video(4))
    (tmp_path / "script.mp4").write_text(script)
    with pytest.raises(ImageError, match="no video that can be read"):
        read_frames(tmp_path / "script.mp4", 2)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ImageError, match="cannot be read: expected a regular file, got a named pipe"):
        read_frames(tmp_path / "pipe.mp4", 2)


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no video that can be read"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "no video that can be read"),
        (b"just text", "no video that can be read"),
        (
            encoded_video(4, "matroska", "libx264").replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ZZZ"),
            "its codec is unknown to FFmpeg",
        ),
        (encoded_video(4, "avi", "zmbv"), "its codec is zmbv, which is not read; convert it: ffmpeg"),
        (encoded_video(4, "nut", "mpeg4"), "no video that can be read"),
        (sound(), "no video stream in it"),
        (encoded_video(0, "matroska"), "no video|no frame"),
    ],
)
def test_what_is_no_video_is_an_error(data: bytes, reason: str):
    with pytest.raises(ImageError, match=reason) as error:
        read_frames(data, 2)
    assert error.value.source == f"{len(data)} bytes"


def test_the_path_is_named_once():
    with pytest.raises(ImageError) as error:
        read_frames("/nowhere/video.mp4", 2)
    assert error.value.source == "/nowhere/video.mp4"
    assert "/nowhere" not in error.value.reason


def test_large_frames_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    data = encoded_video(2)
    monkeypatch.setattr(video, "_scan", None)
    with pytest.raises(ImageError, match="64×32 are 2048 pixels, expected at most 2047"):
        read_frames(data, 2, max_pixels=2047)


def test_the_number_is_checked():
    with pytest.raises(ValueError, match="num_frames: expected ≥ 1, got 0"):
        read_frames(b"", 0)


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "av.error", None)
    with pytest.raises(ImageError, match=r"pip install '\.\[video\]'"):
        read_frames(b"", 1)


def test_an_image_is_no_video_stream_of_a_song():
    """A cover is a video stream to FFmpeg."""
    buffer, cover = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(cover, "JPEG")
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "yuvj420p"
        stream.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(cover.getvalue())
        packet.stream = stream
        packet.pts = packet.dts = 0
        container.mux(packet)
    with pytest.raises(ImageError, match="no video stream in it"):
        read_frames(buffer.getvalue(), 1)

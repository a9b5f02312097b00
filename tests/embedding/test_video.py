import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nopad.embedding.inputs import video
from nopad.embedding.inputs.video import read_frames
from nopad.preprocessing.decode import ImageError


def film(count: int, format: str = "mp4", codec: str = "libx264", gop: int = 6, rotation: int = 0) -> bytes:
    """Grey frames whose level tells their number, with a dark top left quarter."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            array = np.full((32, 64, 3), level(i), np.uint8)
            array[:16, :32] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def level(index: int) -> int:
    return 60 + 4 * index


def numbers(frames: Tensor) -> list[int]:
    return [round((frame[:, -8:, -8:].float().mean().item() - 60) / 4) for frame in frames]


def test_frames_are_the_middles_of_equal_spans_in_the_order_shown():
    frames = read_frames(film(40), 4)
    assert frames.dtype == torch.uint8
    assert frames.shape == (4, 3, 32, 64)
    assert numbers(frames) == [5, 15, 25, 35]  # libx264 stores B-frames out of this order


def test_a_video_of_fewer_frames_gives_all():
    assert numbers(read_frames(film(3), 8)) == [0, 1, 2]
    assert numbers(read_frames(film(1), 8)) == [0]


@pytest.mark.parametrize(
    ("format", "codec"), [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpeg", "mpeg2video")]
)
def test_the_count_needs_no_header(format: str, codec: str):
    assert numbers(read_frames(film(30, format, codec), 3)) == [5, 15, 25]


def test_key_frames_are_used_and_change_nothing(monkeypatch: pytest.MonkeyPatch):
    data = film(40)
    decoded = 0
    upright = video._upright

    def count(*arguments):
        nonlocal decoded
        decoded += 1
        return upright(*arguments)

    monkeypatch.setattr(video, "_decode", None)  # what reads from the start
    monkeypatch.setattr(video, "_upright", count)
    over_keys = read_frames(data, 8)
    assert decoded == 8  # only what is wanted becomes an array
    monkeypatch.undo()
    monkeypatch.setattr(video, "_seek", lambda *_: None)
    assert torch.equal(read_frames(data, 8), over_keys)


def test_where_packets_are_no_frames_the_decoded_ones_count(monkeypatch: pytest.MonkeyPatch):
    data = film(20)
    monkeypatch.setattr(video, "_scan", lambda *_: video._Index(50, None, []))
    assert numbers(read_frames(data, 2)) == [5, 15]


@pytest.mark.parametrize(("rotation", "dark"), [(90, (1, 0)), (-90, (0, 1)), (180, (1, 1))])
def test_a_turned_video_comes_upright(rotation: int, dark: tuple[int, int]):
    frames = read_frames(film(2, rotation=rotation), 1)
    assert frames.shape[2:] == ((64, 32) if abs(rotation) == 90 else (32, 64))
    quarters = frames[0].float().mean(0).unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))
    assert divmod(int(quarters.argmin()), 2) == dark


def test_reading_is_deterministic_and_the_same_from_a_path(tmp_path: Path):
    data = film(40)
    (tmp_path / "a:b.mp4").write_bytes(data)
    assert torch.equal(read_frames(tmp_path / "a:b.mp4", 5), read_frames(data, 5))


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Large frames behind the index, so that a file can be cut or damaged among them."""
    path = tmp_path_factory.mktemp("noise") / "noise.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 64, 3), dtype=np.uint8)
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_video_that_is_cut_short_is_an_error(noise: bytes):
    data = film(20)
    with pytest.raises(ImageError, match="no video that can be read"):
        read_frames(data[: len(data) // 2], 2)
    with pytest.raises(ImageError, match="truncated: the last of"):
        read_frames(noise[: len(noise) * 2 // 3], 2)


def test_damage_inside_is_an_error(noise: bytes):
    data = bytearray(noise)
    middle = len(data) // 2
    data[middle : middle + 2000] = b"\x55" * 2000
    with pytest.raises(ImageError, match="damaged"):
        read_frames(bytes(data), 4)


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
        (sound(), "no video stream in it"),
        (film(0, "matroska"), "no video|no frame"),
    ],
)
def test_what_is_no_video_is_an_error(data: bytes, reason: str):
    with pytest.raises(ImageError, match=reason) as error:
        read_frames(data, 2)
    assert error.value.source == f"{len(data)} bytes"


def test_the_path_is_named_once():
    with pytest.raises(ImageError) as error:
        read_frames("/nowhere/film.mp4", 2)
    assert error.value.source == "/nowhere/film.mp4"
    assert "/nowhere" not in error.value.reason


def test_large_frames_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch):
    data = film(2)
    monkeypatch.setattr(video, "_scan", None)
    with pytest.raises(ImageError, match="64×32 are 2048 pixels, expected at most 2047"):
        read_frames(data, 2, max_pixels=2047)


def test_the_number_is_checked():
    with pytest.raises(ValueError, match="number: expected frames ≥ 1, got 0"):
        read_frames(b"", 0)


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "av.error", None)
    with pytest.raises(ImageError, match=r"pip install 'nopad\[video\]'"):
        read_frames(b"", 1)


def test_a_picture_is_no_video_stream_of_a_song():
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

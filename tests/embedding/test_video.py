import io
import os
import struct
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nopad.preprocessing import containers, video, video_file
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.video import read_frames


def encoded_video(
    count: int,
    format: str = "mp4",
    codec: str = "libx264",
    gop: int = 6,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    noise: bool = False,
    pixel_ratio: Fraction | None = None,
    encoder: dict[str, str] | None = None,
) -> bytes:
    """Grey frames whose level tells their number, with a dark top left quarter."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(0)
    with av.open(buffer, "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 32
        stream.pix_fmt = {"gif": "rgb8", "apng": "rgb24", "zmbv": "bgr0"}.get(codec, "yuv420p")
        stream.codec_context.gop_size = gop
        stream.options = encoder or {}
        if pixel_ratio:
            stream.codec_context.sample_aspect_ratio = pixel_ratio
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            array = np.full((32, 64, 3), level(i), np.uint8)
            array[:16, :32] = 0
            array = rng.integers(0, 256, array.shape, np.uint8) if noise else array
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def level(index: int) -> int:
    return 60 + 4 * index


def numbers(frames: Tensor) -> list[int]:
    return [round((frame[:, -8:, -8:].float().mean().item() - 60) / 4) for frame in frames]


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


NESTED = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")


def rebuilt(data: bytes, boxes: dict[bytes, bytes]) -> bytes:
    """An MP4 with other contents in some of its boxes; boxes named `kind+` are put in before the kind."""
    result, position = b"", 0
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        body = data[position + 8 : position + length]
        body = boxes.get(kind, rebuilt(body, boxes) if kind in NESTED else body)
        result += boxes.get(kind + b"+", b"") + struct.pack(">I4s", len(body) + 8, kind) + body
        position += length
    return result


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def fragmented() -> bytes:
    return encoded_video(4, options={"movflags": "frag_keyframe+empty_moov"})


def edited(edits: int) -> bytes:
    """A video of 40 frames with so many edit lists entries, each for the whole of it."""
    table = words(0, edits) + words(1600, 0, 65536) * edits
    box = struct.pack(">I4s", len(table) + 8, b"elst") + table
    return rebuilt(encoded_video(40), {b"edts": box})


MANY = 88_000_000
SOUND = {b"hdlr": words(0, 0) + b"soun" + bytes(13), b"stts": words(0, 1, MANY, 1)}
BOMBS = {
    "samples of one size": (
        lambda: rebuilt(encoded_video(4), {b"stsz": words(0, 1, MANY)}),
        "claims 88000000 samples in a file of",
    ),
    "samples of a fragment": (
        lambda: rebuilt(fragmented(), {b"trun": words(0, MANY)}),
        "claims 88000004 samples|88000000",
    ),
    "edits": (lambda: edited(300_000), "claims 12000000 samples, expected at most"),
    "samples of a chunk": (
        lambda: rebuilt(encoded_video(4), SOUND | {b"stsc": words(0, 1, 1, 2**31, 1), b"stco": words(0, 9, *range(9))}),
        "claims 18874368 samples, expected at most",
    ),
    "table behind its box": (
        lambda: rebuilt(encoded_video(4), {b"stsz": words(0, 0, 1000)}),
        "table stsz claims 4000 bytes",
    ),
    "chunk behind the file": (
        lambda: rebuilt(encoded_video(4), {b"stco": words(0, 1, 2**31)}),
        "truncated: its data go on to byte",
    ),
    "compressed": (lambda: rebuilt(encoded_video(4), {b"mvhd+": words(8) + b"cmov"}), r"compressed \(cmov\)"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_an_index_that_claims_what_the_file_cannot_hold_is_refused_before_ffmpeg_sees_it(
    case: str, monkeypatch: pytest.MonkeyPatch
):
    make, reason = BOMBS[case]
    data = make()
    monkeypatch.setattr(av, "open", None)
    with pytest.raises(ImageError, match=reason) as error:
        read_frames(data, 2)
    assert "ffmpeg -i IN -c copy OUT.mp4" in error.value.reason


def test_uncompressed_sound_of_many_samples_is_no_bomb():
    data = rebuilt(encoded_video(4), SOUND | {b"stsc": words(0, 1, 1, MANY, 1), b"stco": words(0, 1, 48)})
    assert containers.problem(io.BytesIO(data)) == ""


def test_packets_that_claim_the_same_bytes_again_and_again_end_the_reading():
    assert len(read_frames(edited(1), 2)) == 2
    with pytest.raises(ImageError, match="its packets are more than four times the"):
        read_frames(edited(300), 2)


def test_a_frame_larger_than_its_header_says_is_refused():
    header = rebuilt(encoded_video(4), {})
    at = header.rindex(b"avc1") + 4 + 24
    assert header[at : at + 4] == struct.pack(">HH", 64, 32)
    liar = header[:at] + struct.pack(">HH", 16, 16) + header[at + 4 :]
    assert read_frames(liar, 2, max_pixels=4096).shape == (2, 3, 32, 128)  # shown twice as wide
    with pytest.raises(ImageError, match="expected at most 4095"):
        read_frames(liar, 2, max_pixels=4095)


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
    with pytest.raises(ImageError, match=r"truncated: mdat goes on to byte .* the file ends at"):
        read_frames(noise[: len(noise) * 2 // 3], 2)


CONTAINERS = {
    "mp4": ("mp4", "libx264", {}),
    "fragmented mp4": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mov", "mpeg4", {}),
    "matroska": ("matroska", "libx264", {}),
    "live matroska": ("matroska", "libx264", {"live": "1"}),  # of unknown size
    "webm": ("webm", "libvpx-vp9", {}),
    "avi": ("avi", "mpeg4", {}),
    "flv": ("flv", "flv", {}),
    "ogg": ("ogg", "libvpx", {}),
    "asf": ("asf", "wmv2", {}),
    "transport stream": ("mpegts", "libx264", {}),
    "program stream": ("mpeg", "mpeg2video", {}),
    "gif": ("gif", "gif", {}),
    "apng": ("apng", "apng", {}),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_truncation_is_noticed_in_every_container(container: str):
    format, codec, options = CONTAINERS[container]
    data = encoded_video(40, format, codec, options=options, noise=True)
    assert len(read_frames(data, 4)) == 4
    # Whole packets, as a download that stopped leaves them; the program stream's last tenth is padding.
    for share in (0.3, 0.5, 0.8):
        end = int(len(data) * share)
        end -= end % 188 if format == "mpegts" else 0
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            read_frames(data[:end], 4)


@pytest.mark.parametrize(
    ("codec", "encoder"),
    [
        ("libx265", {"x265-params": "log-level=none"}),
        ("libx265", {"x265-params": "log-level=none:bframes=0:slices=2"}),
        ("libx264", {}),
        ("mpeg2video", {"bf": "2"}),
    ],
    ids=["h265", "h265 in slices", "h264", "mpeg2"],
)
def test_a_transport_stream_may_end_between_frames_and_nowhere_else(codec: str, encoder: dict[str, str]):
    data = encoded_video(14, "mpegts", codec, encoder=encoder, noise=True)
    packets = [data[start : start + 188] for start in range(0, len(data), 188)]
    is_picture = [int.from_bytes(packet[1:3], "big") & 0x1FFF == 256 for packet in packets]
    begins = [here and packet[1] & 0x40 > 0 for here, packet in zip(is_picture, packets, strict=True)]
    outcomes = set()
    for end in range(len(packets) - 40, len(packets) + 1):
        following = next((number for number in range(end, len(packets)) if is_picture[number]), None)
        is_whole = following is None or begins[following]
        outcomes.add(is_whole)
        if is_whole:
            assert len(read_frames(data[: 188 * end], 2)) == 2
        else:
            with pytest.raises(ImageError, match=r"truncated: the last of .* is not whole"):
                read_frames(data[: 188 * end], 2)
    assert outcomes == {True, False}


@pytest.mark.parametrize(("format", "slack"), [("matroska", 0), ("avi", 8), ("flv", 4), ("mpegts", 0)])
def test_each_byte_that_is_missing_at_the_end_is_noticed(format: str, slack: int):
    data = encoded_video(10, format, "flv" if format == "flv" else "mpeg4")
    for missing in (1, 2, 5, 20, 100):
        with pytest.raises(ImageError, match="truncated"):
            read_frames(data[: -missing - slack], 2)


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

"""Videos whose index claims too much, that are cut short or damaged inside."""

import io
import struct

import av
import numpy as np
import pytest
from encoded_videos import encoded_video

from nopad.preprocessing import containers
from nopad.preprocessing.decode import ImageError
from nopad.preprocessing.video import read_frames

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

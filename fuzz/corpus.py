"""Small good files of every kind that is read, and hostile ones, as bytes; the same at each start."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import av
import av.error
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from av.video.stream import VideoStream
from PIL import Image
from safetensors.torch import load_file

MODEL = Path(__file__).parent.parent / "tests/goldens/aimv2-apple-native"
CANARY, MARKER = "secret/canary", "secret/marker"
"""Below the folder of a run: names that hostile files give, and a folder that the code in a pickle would make."""

_SCRIPTS = (
    "ffconcat version 1.0\nfile '../secret/canary.mp4'\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n../secret/canary.mp4\n#EXT-X-ENDLIST\n",
    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../secret/canary.jpg) run\n",
    "<svg xmlns='http://www.w3.org/2000/svg'><image href='../secret/canary.jpg'/></svg>",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    "<?xml version='1.0'?><MPD><BaseURL>../secret/canary.mp4</BaseURL></MPD>",
    "push graphic-context\nimage over 0,0 0,0 'msl:../secret/canary.jpg'\npop graphic-context\n",
)


@dataclass(frozen=True)
class Corpus:
    """Seeds by kind."""

    pictures: list[tuple[str, bytes]]
    films: list[tuple[str, bytes]]
    tars: list[bytes]
    parquets: list[bytes]
    datasets: list[dict[str, bytes]]
    checkpoints: list[dict[str, bytes]]

    @classmethod
    def make(cls) -> Corpus:
        """Write and read back all of it."""
        scripts = [text.encode() for text in _SCRIPTS]
        pictures, films = list(_pictures()), list(_films())
        cells = [data for _, data in pictures[:4]]
        return cls(
            pictures=pictures + [(suffix, script) for script in scripts for suffix in (".jpg", ".png")],
            films=films + [(".mp4", script) for script in scripts],
            tars=list(_tars(cells)),
            parquets=list(_parquets(cells)),
            datasets=[_dataset(cells)],
            checkpoints=list(_checkpoints()),
        )


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """RGB noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(format: str, image: Image.Image, **options) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _pictures() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(noise(0, 24, 20))
    more = {"save_all": True, "append_images": [image.rotate(180), image.rotate(90).resize(image.size)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    yield ".jpg", encode("JPEG", image, exif=exif)
    yield ".png", encode("PNG", image)
    yield ".jpg", encode("JPEG", image, progressive=True, subsampling=2)
    yield ".webp", encode("WEBP", image)
    yield ".jpg", encode("JPEG", image.convert("CMYK"))
    yield ".png", encode("PNG", image.quantize(16), transparency=3)
    yield ".png", encode("PNG", Image.fromarray(noise(1, 8, 8)[..., 0].astype(np.uint16) * 257))
    yield ".png", encode("PNG", image, **more)
    yield ".gif", encode("GIF", image, **more)
    yield ".webp", encode("WEBP", image, lossless=True, **more)
    for compression in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        yield ".tif", encode("TIFF", image, compression=compression)
    yield ".tif", encode("TIFF", image.convert("1"), compression="group4")
    for format in ("BMP", "ICO", "PPM", "TGA", "JPEG2000", "DDS", "DIB", "PCX", "SGI", "ICNS"):
        yield ".bmp" if format == "DIB" else f".{format.lower()[:4]}", encode(format, image)
    yield ".xbm", encode("XBM", image.convert("1"))
    if "AVIF" in Image.SAVE:
        yield ".avif", encode("AVIF", image)
    try:
        import pillow_heif
    except ImportError:
        return
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image.resize((64, 64))).save(buffer)
    yield ".heic", buffer.getvalue()


def _films() -> Iterator[tuple[str, bytes]]:
    for container, suffix, codec, options in (
        ("mp4", ".mp4", "mpeg4", {}),
        ("mp4", ".mp4", "libx264", {}),
        ("mp4", ".mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", ".mov", "mjpeg", {}),
        ("matroska", ".mkv", "libx264", {}),
        ("webm", ".webm", "libvpx", {}),
        ("avi", ".avi", "mpeg4", {}),
        ("mpegts", ".mpg", "mpeg2video", {}),
        ("mpegts", ".mpg", "libx265", {}),
        ("mpeg", ".mpeg", "mpeg1video", {}),
        ("flv", ".mp4", "flv", {}),
        ("ogg", ".mp4", "libvpx", {}),
        ("asf", ".mp4", "wmv2", {}),
        ("gif", ".mp4", "gif", {}),
    ):
        buffer = io.BytesIO()
        try:
            with av.open(buffer, "w", format=container, container_options=options) as output:
                stream = cast(VideoStream, output.add_stream(codec, rate=25))
                stream.width, stream.height = 64, 48
                stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8"}.get(codec, "yuv420p")
                if codec == "libx265":
                    stream.options = {"x265-params": "log-level=none"}
                for level in range(0, 240, 24):
                    frame = av.VideoFrame.from_ndarray(noise(level, 48, 64) // 2 + level // 2, format="rgb24")
                    output.mux(stream.encode(frame))
                output.mux(stream.encode())
        except (av.error.FFmpegError, ValueError):  # an encoder that this FFmpeg lacks
            continue
        yield suffix, buffer.getvalue()


def _tars(cells: list[bytes]) -> Iterator[bytes]:
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format, pax_headers={"comment": "é"}) as archive:
            for number, data in enumerate(cells):
                folder = "é" * 60 + "/" if number == 2 and format != tarfile.USTAR_FORMAT else ""
                member = tarfile.TarInfo(f"{folder}{number}.png")
                member.size, member.mtime = len(data), 1 << (40 if format == tarfile.PAX_FORMAT else 20)
                archive.addfile(member, io.BytesIO(data))
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.LNKTYPE, "0.png"
            archive.addfile(link)
        yield buffer.getvalue()
    yield _sparse_tar()


def _sparse_tar() -> bytes:
    """A sparse member of GNU's format 1.0: its map stands in its data."""
    member = tarfile.TarInfo("sparse.png")
    data = b"1\n0\n4\n".ljust(512, b"\0") + b"data".ljust(512, b"\0")
    member.size = 516
    member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4"}
    return member.tobuf(tarfile.PAX_FORMAT) + data + bytes(1024)


def _parquets(cells: list[bytes]) -> Iterator[bytes]:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    named = [{"bytes": None, "path": path} for path in ("../secret/canary.jpg", "/etc/passwd", "\0", "")]
    kinds: list[tuple[pa.DataType, list[Any], dict[str, Any]]] = [
        (pa.binary(), cells, {}),
        (pa.binary(), cells * 50, {"compression": "zstd", "row_group_size": 30}),
        (pa.large_binary(), cells, {"compression": "gzip", "use_dictionary": False}),
        (pa.dictionary(pa.int32(), pa.binary()), cells * 5, {"compression": "snappy"}),
        (struct, [{"bytes": cell, "path": None} for cell in cells] + named, {"data_page_version": "2.0"}),
        (pa.binary(), [*cells, None], {"compression": "lz4", "write_page_index": True}),
    ]
    for type, values, options in kinds:
        table = pa.table({"image": pa.array(values, type), "label": list(range(len(values)))})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, **options)
        yield buffer.getvalue()


def _dataset(cells: list[bytes]) -> dict[str, bytes]:
    """The files of a folder that `datasets` has saved."""
    buffer = io.BytesIO()
    type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array([{"bytes": cell, "path": None} for cell in cells], type)})
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": "train"}
    return {
        "data-00000-of-00001.arrow": buffer.getvalue(),
        "state.json": json.dumps(state).encode(),
        "dataset_info.json": b'{"features": {"image": {"_type": "Image"}}}',
    }


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (self.folder,)


def _checkpoints() -> Iterator[dict[str, bytes]]:
    weights = (MODEL / "model.safetensors").read_bytes()
    config = (MODEL / "config.json").read_bytes()
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3}
    preprocessor = json.dumps({**pixels, "size": {"height": 8, "width": 8}, "do_resize": True}).encode()
    yield {"model.safetensors": weights, "config.json": config, "preprocessor_config.json": preprocessor}
    tensors = load_file(MODEL / "model.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}).encode()
    yield {"model-1.safetensors": weights, "model.safetensors.index.json": index, "config.json": config}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(tensors, buffer, _use_new_zipfile_serialization=zipped)
        yield {"pytorch_model.bin": buffer.getvalue(), "config.json": config}
    for protocol in (0, 2, 4):
        yield {"pytorch_model.bin": pickle.dumps({"weight": _Code(MARKER)}, protocol), "config.json": config}


def folder_of(files: dict[str, bytes], folder: Path) -> Path:
    """Write files into a new folder."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder

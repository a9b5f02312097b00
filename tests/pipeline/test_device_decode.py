"""JPEGs that come from the decode processes as they are, and the GPU that decodes them."""

import io
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import Pipe
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nopad
from nopad.embedding.inputs.media import MediaDecoder
from nopad.pipeline import device_decode, nvjpeg, process_server
from nopad.pipeline.decode_channel import DecodeChannel
from nopad.pipeline.forked import answer
from nopad.pipeline.image_processor import ImageProcessor
from nopad.pipeline.isolation import DecodeProcesses
from nopad.pipeline.memory import MemoryBudget
from nopad.pipeline.process_server import Process
from nopad.pipeline.worker import Worker
from nopad.preprocessing.decode import ImageError


def photo(width: int, height: int, orientation: int = 1, format: str = "JPEG", **options) -> bytes:
    """A smooth picture with an edge, as photos are."""
    y, x = np.mgrid[0:height, 0:width] / 40
    levels = np.stack([np.sin(x) + np.cos(y), np.sin(x + y), np.where(x > 3, 1, -1) + 0 * y], 2)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(((levels + 2) * 60).astype(np.uint8))
    image.save(file, format, exif=exif, **options)
    return file.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


FILES = [
    *(photo(300 + 10 * n, 200, n, subsampling=n % 3) for n in range(1, 9)),
    photo(120, 500, quality=95),
    photo(700, 90, 6),
    photo(200, 150, progressive=True),
    photo(200, 150, format="PNG"),
    photo(40, 40),
]


def prepare(worker: Worker, files):
    with worker.read_ahead([files], lambda data: data, decoder=MediaDecoder()) as ahead:
        return [image for group in ahead.groups() for image in group]


def test_processes_keep_jpegs_and_decode_the_rest(encoder):
    processor, budget = ImageProcessor.of(encoder), MemoryBudget(1 << 30)
    keeping = DecodeProcesses(MediaDecoder(thumbnails=32), processor, keep_jpegs=True)
    here = DecodeProcesses(MediaDecoder(thumbnails=32), processor)
    for data in FILES:
        image, expected = keeping.prepare(data, budget.reservation()), here.prepare(data, budget.reservation())
        assert (image.grid, image.width, image.height) == (expected.grid, expected.width, expected.height)
        assert image.extras.keys() == expected.extras.keys() == {"thumbnail"}
        if data.startswith(b"\xff\xd8") and b"\xff\xc2" not in data:
            assert image.data.numpy().tobytes() == data
            assert image.orientation == Image.open(io.BytesIO(data)).getexif()[0x0112]
        else:
            assert image.orientation is None
            assert torch.equal(image.data, expected.data)


def test_a_kept_jpeg_stays_in_its_batch_however_large_it_is_decoded(encoder, monkeypatch):
    """At an eighth of its size it takes little; what is decoded here and exceeds the allowance goes alone."""
    monkeypatch.setattr("nopad.pipeline.memory.MAX_ALLOWANCE_BYTES", 1 << 20)
    sent: list[int] = []  # files each time
    one, batch = DecodeChannel.prepare, DecodeChannel.prepare_batch

    def prepare_batch(channel: DecodeChannel, files: Sequence[bytes], *rest: Any) -> Any:
        sent.append(len(files))
        return batch(channel, files, *rest)

    monkeypatch.setattr(DecodeChannel, "prepare", lambda *a: sent.append(1) or one(*a))
    monkeypatch.setattr(DecodeChannel, "prepare_batch", prepare_batch)
    worker = Worker(encoder, threads=1)
    worker.decode = "gpu"
    large = photo(640, 480)
    images = prepare(worker, [large] * 6)
    assert [image.orientation for image in images] == [1] * 6
    assert sum(sent) == 6  # none again, alone
    sent.clear()
    images = prepare(worker, [photo(640, 480, progressive=True)] * 3 + [large] * 3)
    assert [image.orientation for image in images] == [None] * 3 + [1] * 3
    assert sent.count(1) >= 3


def test_damage_is_worded_as_on_the_cpu(encoder):
    processor, budget = ImageProcessor.of(encoder), MemoryBudget(1 << 30)
    reasons = []
    for keep_jpegs in (False, True):
        processes = DecodeProcesses(MediaDecoder(max_pixels=70_000), processor, keep_jpegs=keep_jpegs)
        for data in (cut(FILES[0]), cut(FILES[-2]), FILES[7], b"\xff\xd8nothing"):
            with pytest.raises(ImageError) as error:
                processes.prepare(data, budget.reservation())
            reasons.append(error.value.reason)
    assert reasons[:4] == reasons[4:]


def test_without_a_gpu(encoder):
    with pytest.raises(ValueError, match="got 'gpu', which does not work here: the encoder is on cpu"):
        Worker(encoder, decode="gpu")
    with pytest.raises(
        ValueError, match="does not work here: resize='pil' is bit-exact with Pillow, which the GPU is not"
    ):
        Worker(encoder, decode="gpu", resize="pil")
    worker = Worker(encoder, decode="auto")
    assert (worker.decode, worker.gpu_unsupported_reason) == ("cpu", "the encoder is on cpu")
    assert "GPU" not in worker.preprocessing


def test_engines_are_started_once_and_waited_for(monkeypatch):
    """In a thread, while weights are read; a call meanwhile returns the same."""
    began, answer, calls = threading.Event(), threading.Event(), []

    def slow(device):
        calls.append(device)
        began.set()
        answer.wait()
        return "no engine"

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(device_decode, "_why_unavailable", lru_cache(slow))
    monkeypatch.setattr(torch, "empty", lambda *shape, device: SimpleNamespace(device=gpu))
    thread = device_decode.start_engines(torch.device("cuda"))
    began.wait()
    with ThreadPoolExecutor(1) as pool:
        reason = pool.submit(device_decode.why_unavailable, gpu)
        answer.set()
        assert reason.result() == "no engine"
    thread.join()
    assert calls == [gpu]


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["cuda"]), ("cpu", [])])
def test_engines_that_do_not_start_are_left_to_what_uses_them(monkeypatch, device, expected):
    devices, errors = [], []

    def empty(*shape, device):
        devices.append(device.type)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    device_decode.start_engines(torch.device(device)).join()
    assert (devices, errors) == (expected, [])


def test_without_a_library_that_loads(monkeypatch, tmp_path):
    monkeypatch.setattr(nvjpeg, "_paths", list)
    assert not nvjpeg.is_installed()
    with pytest.raises(nvjpeg.NvjpegError, match="nvJPEG: it is not installed"):
        nvjpeg.Nvjpeg()
    (tmp_path / "libnvjpeg.so.13").write_text("no library")
    monkeypatch.setattr(nvjpeg, "_paths", lambda: [str(tmp_path / "libnvjpeg.so.13")])
    with pytest.raises(nvjpeg.NvjpegError, match=r"libnvjpeg\.so\.13"):
        nvjpeg.Nvjpeg()


def test_newest_library_is_tried_first(monkeypatch, tmp_path):
    for name in ("cu12/lib/libnvjpeg.so.12", "cu13/lib/libnvjpeg.so.13", "old/lib/libnvjpeg.so.9"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(nvjpeg, "_folders", lambda: [str(tmp_path)])
    assert [path.rpartition(".")[2] for path in nvjpeg._paths()] == ["13", "12", "9"]


@pytest.fixture(scope="module")
def on_gpu(encoder):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    gpu = nopad.load(encoder.source, device="cuda", dtype=torch.bfloat16)
    try:
        return Worker(gpu, decode="gpu")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
def test_patches_differ_by_a_grey_level_at_most(on_gpu):
    """Also in a call with others, and whatever the order of the passes is."""
    images = prepare(on_gpu, FILES)
    expected = torch.cat([image.data for image in prepare(Worker(on_gpu.encoder), FILES)])
    upload = on_gpu.runner().uploader
    together = upload(images)().cpu()
    torch.cuda.synchronize()
    difference = (together.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02
    alone = torch.cat([upload([image])().cpu() for image in images])
    assert torch.equal(alone, together)


@pytest.mark.gpu
def test_features_are_those_of_the_cpus_pixels_nearly(on_gpu):
    files = [*FILES, cut(FILES[3]), *FILES[:5]]
    (gpu,) = on_gpu.run([files], lambda data: data, decoder=MediaDecoder())
    (cpu,) = Worker(on_gpu.encoder).run([files], lambda data: data, decoder=MediaDecoder())
    assert [str(one.error) for one in gpu] == [str(one.error) for one in cpu]
    assert [one.grid for one in gpu] == [one.grid for one in cpu]
    pairs = [(a.embedding, b.embedding) for a, b in zip(gpu, cpu, strict=True) if a.error is None]
    cosines = [float(torch.cosine_similarity(*map(torch.from_numpy, pair), dim=0)) for pair in pairs]
    assert min(cosines) > 0.999


LIES = [{"grid": [1, 9, 9]}, {"width": 9}, {"orientation": 9}, {"extras": 3}, {"jpeg": 0}, {"width": 40, "height": 32}]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: ",".join(lie))
def test_a_process_that_lies_about_a_jpeg_is_a_crash(encoder, monkeypatch, lie):
    data, processor = photo(32, 40), ImageProcessor.of(encoder)
    fields = {"jpeg": len(data), "orientation": 1, "width": 32, "height": 40, "extras": {}}
    fields |= {"grid": list(processor.grid_of(40, 32)), **lie}
    if "height" in lie:
        fields["grid"] = list(processor.grid_of(32, 40))

    def serve(connection):
        connection.recv()
        answer(connection, bytes=1 << 20)
        connection.recv()
        answer(connection, memoryview(data), **fields)

    def fork(program):
        ours, theirs = Pipe()
        threading.Thread(target=serve, args=(theirs,), daemon=True).start()
        return Process(ours, os.getpid(), None, process_server.start())

    monkeypatch.setattr(process_server, "fork", fork)
    processes = DecodeProcesses(MediaDecoder(), processor, keep_jpegs=True)
    with pytest.raises(ImageError, match="its decoder crashed"):
        processes.prepare(data, MemoryBudget(1 << 30).reservation())


class HeadersAlone:
    """Stands in for the library: each function succeeds, and a file's size is read where its header was parsed."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.parsed = 0

    def __getattr__(self, name: str):
        def function(*arguments) -> int:
            if name.endswith("Create"):
                self.created.append(name)
            elif name == "nvjpegJpegStreamParseHeader":
                self.parsed = arguments[2].value
                time.sleep(0)  # another thread may go on
            elif name == "nvjpegDecodeBatchedSupported":
                arguments[2]._obj.value = 0
            elif name == "nvjpegJpegStreamGetFrameDimensions":
                arguments[1]._obj.value = arguments[2]._obj.value = self.parsed
            return 0

        return function


def test_threads_that_come_and_go_read_headers_with_one_decoder(monkeypatch):
    """Each run has upload threads of its own; what is made for a thread is never freed."""
    library = HeadersAlone()
    monkeypatch.setattr(nvjpeg, "_load", lambda: (library, library))
    decoder = nvjpeg.Nvjpeg()
    created = list(library.created)
    files = [np.zeros(size, np.uint8) for size in range(1, 301)]  # without a scan, they are looked through whole
    for _ in range(2):
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(decoder.size, files)) == [(len(file), len(file)) for file in files]
    assert library.created == created


@pytest.mark.parametrize("comment", [b"", bytes(20_000)])
def test_the_library_reads_no_more_than_the_header_of_a_file(monkeypatch, comment):
    library = HeadersAlone()
    monkeypatch.setattr(nvjpeg, "_load", lambda: (library, library))
    data = photo(640, 480, comment=comment)
    scan = data.index(b"\xff\xda")
    assert nvjpeg.Nvjpeg().size(np.frombuffer(data, np.uint8)) == (scan + 14, scan + 14)  # 12 bytes about three colours


@pytest.mark.parametrize("end", [0, 1, 2, 3, 4, 5, 20])
def test_the_header_of_a_cut_file_ends_with_it(monkeypatch, end):
    library = HeadersAlone()
    monkeypatch.setattr(nvjpeg, "_load", lambda: (library, library))
    data = photo(64, 48)
    data = data[: data.index(b"\xff\xda") + end]
    size = nvjpeg.Nvjpeg().size(np.frombuffer(data, np.uint8))
    assert size is not None
    assert size[0] <= len(data)
